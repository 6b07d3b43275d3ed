"""{norm + up + activation}: the first half of a feed-forward layer, gated or not."""

from collections.abc import Callable

from torch import Tensor, nn

from fms.kernels import skinny
from fms.kernels.norm_linear import norm_linear
from fms.kernels.weights import Weights


def norm_glu(
    x: Tensor, norm: nn.Module | None, up: Weights, activation: Callable[[Tensor], Tensor], gated: bool = True
) -> Tensor:
    """`activation(gate) * up` of a fused projection (gate's rows, then up's), or `activation(up)`: (..., in) to
    (..., hidden)."""
    kind = skinny.activation_kind(activation)
    if kind is not None and (y := skinny.apply(x, up, norm, kind, gated)) is not None:
        return y
    h = norm_linear(x, norm, up)
    if not gated:
        return activation(h)
    gate, up_part = h.chunk(2, dim=-1)
    return activation(gate).mul_(up_part)
