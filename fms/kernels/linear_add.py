"""{linear + residual}: the projection that ends a sub-layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fms.kernels import skinny
from fms.kernels.weights import Weights


def linear_add(x: Tensor, linear: Weights, residual: Tensor, scale: float = 1.0) -> Tensor:
    """`residual + scale * linear(x)`: x is (..., in), residual (..., out)."""
    if (y := skinny.apply(x, linear, residual=residual, scale=scale)) is not None:
        return y
    return torch.add(residual, F.linear(x, linear.weight, linear.bias), alpha=scale)
