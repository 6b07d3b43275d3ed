"""{linear + residual}: the projection that ends a sub-layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fms.kernels import skinny
from fms.kernels.weights import Weights


def linear_add(x: Tensor, linear: Weights, residual: Tensor, scale: float = 1.0, own: bool = False) -> Tensor:
    """`residual + scale * linear(x)`: x is (..., in), residual (..., out), which may be overwritten if it is `own`."""
    if (y := skinny.apply(x, linear, residual=residual, scale=scale)) is not None:
        return y
    alike = residual.dtype == linear.weight.dtype == x.dtype
    if own and alike and linear.bias is None and residual.is_contiguous() and skinny.passes(x):
        residual.flatten(0, -2).addmm_(x.flatten(0, -2), linear.weight.t(), alpha=scale)  # no pass of its own
        return residual
    return torch.add(residual, F.linear(x, linear.weight, linear.bias), alpha=scale)
