"""{linear + residual}: the projection that ends a sub-layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fms.kernels.weights import Weights


def linear_add(x: Tensor, linear: Weights, residual: Tensor, scale: float = 1.0) -> Tensor:
    """`residual + scale * linear(x)`: x is (..., in), residual (..., out)."""
    if linear.bias is not None:
        return torch.add(residual, F.linear(x, linear.weight, linear.bias), alpha=scale)
    y = torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), linear.weight.t(), alpha=scale)
    return y.view_as(residual)
