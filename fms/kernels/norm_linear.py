"""{norm + linear}: the projection of a normalised input."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms.kernels import skinny
from fms.kernels.launching import machine
from fms.kernels.weights import Weights

KEPT = 64  # launches of a layer at most: prompts are of any length


def norm_linear(x: Tensor, norm: nn.Module | None, linear: Weights) -> Tensor:
    """`linear(norm(x))`, or without a norm `linear(x)`: (..., in) to (..., out)."""
    if (y := skinny.apply(x, linear, norm)) is not None:
        return y
    h = x if norm is None else normalise(x, norm, getattr(linear, "ready", None))
    return F.linear(h, linear.weight, linear.bias)


def normalise(x: Tensor, norm: nn.Module, ready: dict[Any, Any] | None = None) -> Tensor:
    """`norm(x)`. On a GPU a kernel that is launched early, and what launches it is kept in `ready`; on a CPU an RMSNorm
    is five short operations, where PyTorch takes ten."""
    if torch.compiler.is_compiling():
        return norm(x)
    if ready is not None:
        key = x.shape, x.dtype, x.device, skinny.norm_now(norm)
        found = ready.get(key)
        if found is not None and not (torch.is_grad_enabled() and (x.requires_grad or learns(norm))):
            return found[0](x)
    if not (kind := skinny.norm_kind(norm)):
        return norm(x)
    weight, bias, eps = skinny.parts_of(norm, kind)
    if skinny.passes(x) and weight.dtype == x.dtype and not learns(norm):
        known, k = machine(x.device), x.shape[-1]
        assert known is not None
        again = skinny.prepare_norm(x.numel() // k, k, kind, weight, bias, eps, known)
        if ready is not None:
            if len(ready) > KEPT:
                ready.clear()
            ready[key] = again, dict(norm._parameters)
        return again(x)
    if kind == 2 or x.device.type != "cpu" or x.dtype == torch.float64:
        return norm(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rms = length.mul_(x.shape[-1] ** -0.5).hypot_(_root(eps))  # sqrt(mean(x^2) + eps)
    return torch.div(x, rms).mul_(weight).type_as(x)


def learns(norm: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in norm.parameters())


@cache
def _root(eps: float) -> Tensor:
    return torch.tensor(eps).sqrt()
