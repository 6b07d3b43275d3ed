"""{residual + norm}: between two sub-layers, of more rows than the kernels for few take."""

import torch
from torch import Tensor, nn

from fms.kernels.launching import machine
from fms.kernels.norm_linear import learns, normalise
from fms.kernels.skinny import ROWS, norm_kind, parts_of, passes, prepare_norm


def serves_add_norm(x: Tensor, norm: nn.Module) -> bool:
    """Whether one pass over rows x (..., emb_dim) does it: fewer rows are added where they are computed."""
    return passes(x) and x.numel() > ROWS * x.shape[-1] and bool(norm_kind(norm))


def add_norm(y: Tensor, residual: Tensor, norm: nn.Module, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`residual + scale * y`, and that normalised: all (..., emb_dim)."""
    known, kind = machine(y.device), norm_kind(norm)
    learning = learns(norm) or (torch.is_grad_enabled() and (y.requires_grad or residual.requires_grad))
    if known is None or not kind or learning or residual.dtype != y.dtype:
        total = torch.add(residual, y, alpha=scale)
        return total, normalise(total, norm)
    y, residual = y.contiguous(), residual.contiguous()
    total = torch.empty_like(y)
    k = y.shape[-1]
    return total, prepare_norm(y.numel() // k, k, kind, *parts_of(norm, kind), known, True)(y, residual, scale, total)
