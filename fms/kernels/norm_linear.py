"""{norm + linear}: the projection of a normalised input."""

import torch.nn.functional as F
from torch import Tensor, nn

from fms.kernels.weights import Weights


def norm_linear(x: Tensor, norm: nn.Module, linear: Weights) -> Tensor:
    """`linear(norm(x))`: (..., in) to (..., out)."""
    return F.linear(norm(x), linear.weight, linear.bias)
