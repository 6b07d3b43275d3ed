"""{norm + up + activation}: the first half of a feed-forward layer, gated or not."""

from collections.abc import Callable

from torch import Tensor, nn

from fms.kernels import skinny
from fms.kernels.launching import start
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
    if kind is not None and skinny.passes(h):
        return _launch(h, kind)
    gate, up_part = h.chunk(2, dim=-1)
    return activation(gate).mul_(up_part)


def _launch(h: Tensor, activation: int) -> Tensor:
    """`act(gate) * up` of (..., 2 hidden), in one pass over it."""
    from fms.kernels.gpu import rows as kernels

    h, n = h.contiguous(), h.shape[-1] // 2
    y = h.new_empty(*h.shape[:-1], n)
    rows, block = y.numel() // n, 2048
    sizes = {"N": n, "BLOCK": block, "ACT": activation, "num_warps": 8}
    start(kernels.glu, (h, y), (), lambda: ((rows, -(-n // block)), sizes), (rows, n, activation))
    return y
