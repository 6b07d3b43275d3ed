"""AdamW with its groups, and the course of the learning rate."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from fms.kernels.adamw import adamw_, serves_adamw

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


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Of all of them together, wherever their parts are; in fp32 at least."""
    if not gradients:
        return torch.zeros(())
    groups: dict[Any, list[Tensor]] = {}
    for g in gradients:
        groups.setdefault((g.device_mesh, g.placements) if isinstance(g, DTensor) else None, []).append(local(g))
    squares = []
    for place, parts in groups.items():
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        square = torch.stack(torch._foreach_norm(parts, 2, wide)).square().sum()
        if place is not None:
            mesh, placements = place
            said = [Replicate() if p.is_replicate() else Partial() for p in placements]
            square = DTensor.from_local(square, mesh, said).full_tensor()
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def local(t: Tensor) -> Tensor:
    """What this rank has of it."""
    return t._local_tensor if isinstance(t, DTensor) else t


@torch.no_grad()
def clip(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """Scale all gradients down to a norm of `most`; 0: leave them. Returns the norm before, of the whole model."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = total_norm(gradients)
    if most:
        torch._foreach_mul_([local(g) for g in gradients], _shrinking(norm, most))
    return norm


def _shrinking(norm: Tensor, most: float) -> Tensor:
    return (most / (norm + 1e-6)).clamp(max=1)


def steps_at_once(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step_at_once` takes its parameters."""
    return all(serves_adamw(local(p)) for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def step_at_once(optimizer: torch.optim.AdamW, most: float, copies: Mapping[nn.Parameter, nn.Parameter]) -> Tensor:
    """`clip` and a step, unless gradients are not finite, in one pass over all there is after that for the norm, which
    is returned. `copies` are to be what the parameters become; a parameter's gradient may be its copy's."""
    trained: list[tuple[nn.Parameter, Tensor, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            gradient = copies[p].grad if p.grad is None and p in copies else p.grad
            if gradient is not None:
                trained.append((p, gradient, group))
    norm = total_norm([gradient for _, gradient, _ in trained])
    if not trained:
        return norm
    finite = norm.isfinite().float()
    states = [optimizer.state[p] for p, _, _ in trained]
    steps, (beta1, beta2) = [state["step"] for state in states], trained[0][2]["betas"]
    torch._foreach_add_(steps, finite)
    counts = torch.stack(steps).double()
    factor = _shrinking(norm, most) if most else torch.ones_like(norm)
    told = (factor.expand_as(counts), 1 - beta1**counts, (1 - beta2**counts).sqrt(), finite.expand_as(counts))
    rows = torch.stack(told, 1).float().unbind()
    for (p, gradient, group), state, row in zip(trained, states, rows, strict=True):
        mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
        copy = local(copies[p]) if p in copies else None
        how = group["lr"], group["weight_decay"], group["betas"], group["eps"]
        adamw_(local(p), local(gradient), mean, square, copy, row, *how)
    for copy in copies.values():
        copy.grad = None
    return norm
