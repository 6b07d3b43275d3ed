"""{norm + gate and up + activation}: the first half of a gated feed-forward layer."""

from collections.abc import Callable

from torch import Tensor, nn

from fms.kernels.norm_linear import norm_linear
from fms.kernels.weights import Weights


def norm_glu(x: Tensor, norm: nn.Module, gate_up: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`activation(gate) * up` of a fused projection (gate's rows, then up's): (..., in) to (..., hidden)."""
    gate, up = norm_linear(x, norm, gate_up).chunk(2, dim=-1)
    return activation(gate).mul_(up)
