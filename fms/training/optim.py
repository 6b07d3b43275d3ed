"""AdamW with its groups, and the course of the learning rate."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
) -> torch.optim.AdamW:
    """Fused AdamW over what has gradients. Matrices decay; embeddings, norms and biases do not.

    Its state is there from the beginning, so that a checkpoint can be read into it.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if p.dim() >= 2 and id(p) not in embeddings]
    rest = [p for p in trained if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)
    for p in trained:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def make_schedule(
    kind: str, steps: int, warmup: int = 0, least: float = 0.1, decay: float = 0.2
) -> Callable[[int], float]:
    """The share of the learning rate for each step, counted from 0.

    All rise over `warmup` steps. "cosine" and "linear" then fall to the share `least` at the end; "wsd" holds, and
    falls over the last `decay` of the steps (Hu et al. 2024, arXiv 2404.06395); "constant" holds.
    """
    if kind not in SCHEDULES:
        from fms.utils.serialization.errors import nearest

        raise ValueError(f"schedule={kind!r} is not known{nearest(kind, SCHEDULES)}; there are {', '.join(SCHEDULES)}")
    begin = max(warmup, round(steps * (1 - decay))) if kind == "wsd" else warmup

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if kind == "constant" or step < begin:
            return 1.0
        done = min((step - begin) / max(steps - begin, 1), 1.0)
        fallen = (1 - math.cos(math.pi * done)) / 2 if kind == "cosine" else done
        return 1 - (1 - least) * fallen

    return share


def shrinking(norm: Tensor, most: float) -> Tensor:
    """The factor that takes gradients of this norm down to one of `most`; 1 for smaller ones."""
    return (most / (norm + 1e-6)).clamp(max=1)


def clip(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """Scale all gradients down to a norm of `most`; 0: leave them. Returns the norm before, of the whole model."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if most:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
