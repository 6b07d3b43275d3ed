"""Mixed precision of one process: bf16 copies of fp32 parameters, as FSDP makes them where there are several."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fms.kernels.adamw import adamw_, serves_adamw
from fms.training.optim import shrinking


class Copies:
    """What a root computes with in place of its parameters; gradients come to the copies."""

    def __init__(self, root: nn.Module):
        self.places = [
            (m._parameters, name, p)
            for m in root.modules()
            for name, p in m._parameters.items()
            if p is not None and p.dtype != torch.bfloat16
        ]
        self.made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays tied
        for _, _, p in self.places:
            if p not in self.made:
                self.made[p] = nn.Parameter(p.detach().to(torch.bfloat16), p.requires_grad)
        self.versions = {p: p._version for p in self.made}  # that copies were made of

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within, the copies stand where the parameters were."""
        for p, copy in self.made.items():
            if self.versions.get(p) != p._version:
                copy.detach().copy_(p.detach())
                self.versions[p] = p._version
        for parameters, name, p in self.places:
            parameters[name] = self.made[p]
        try:
            yield
        finally:
            for parameters, name, p in self.places:
                parameters[name] = p

    def changed(self) -> None:
        """Say that parameters were written, for fused optimizers leave their versions as they are."""
        self.versions.clear()

    def add_up(self) -> None:
        """Move gradients to the parameters, in fp32."""
        for p, copy in self.made.items():
            if copy.grad is not None:
                p.grad = copy.grad.to(p.dtype) if p.grad is None else p.grad.add_(copy.grad)
                copy.grad = None

    def serve(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `step` takes its parameters."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return all(serves_adamw(p.device) and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)

    def step(self, optimizer: torch.optim.AdamW, most: float) -> Tensor:
        """Clip gradients to a norm of `most` (0: do not) and step unless they are not finite, wherever they are, in
        one pass over them after that for their norm, which is returned."""
        trained: list[tuple[nn.Parameter, Tensor, dict[str, Any]]] = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradient = self.made[p].grad if p.grad is None else p.grad
                if gradient is not None:
                    trained.append((p, gradient, group))
        norm = torch.stack(torch._foreach_norm([g for _, g, _ in trained], 2, torch.float32)).norm()
        finite = norm.isfinite().float()
        states = [optimizer.state[p] for p, _, _ in trained]
        torch._foreach_add_([state["step"] for state in states], finite)
        count = states[0]["step"].double()
        (beta1, beta2), eps = trained[0][2]["betas"], trained[0][2]["eps"]
        factor = shrinking(norm, most) if most else torch.ones_like(norm)
        told = torch.stack((factor, 1 - beta1**count, (1 - beta2**count).sqrt(), finite)).float()
        for (p, gradient, group), state in zip(trained, states, strict=True):
            means = state["exp_avg"], state["exp_avg_sq"]
            adamw_(p, gradient, *means, self.made[p], told, group["lr"], group["weight_decay"], (beta1, beta2), eps)
        for copy in self.made.values():
            copy.grad = None
        return norm
