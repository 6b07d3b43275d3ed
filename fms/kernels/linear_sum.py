"""{linear + sum over ranks + residual}: the end of a sub-layer whose weights several ranks share, of few rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fms.kernels.launching import Sizes, machine, power, repeated
from fms.kernels.ops import define
from fms.kernels.skinny import ROWS, choose, few_rows, serves
from fms.kernels.sum_add import Peers, in_pairs, peers_of, products, room, sum_add


def linear_sum(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, peers: Peers, scale: float = 1.0
) -> Tensor | None:
    """`residual + scale * (the ranks' sum of x @ weight.T + bias)`, the same bits on all ranks: x (..., in), residual
    (..., out), of one dtype. `None` on all of them where no kernel does this at once. NaN where another rank has not
    come for minutes."""
    if x.numel() > ROWS * x.shape[-1] or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return None
    # all that decides: other layers of these shapes come here, too
    w = weight.shape, weight.dtype, weight.device, type(weight), weight.is_contiguous()
    kind = x.shape, x.dtype, x.device, w, bias is None or bias.dtype, residual.dtype
    run = peers.ready.get(kind)
    if run is None:
        run = peers.ready[kind] = _prepare(x, weight, bias, residual, peers) or _none
    if run is _none:
        return None
    x, residual = x.contiguous(), in_pairs(residual)
    y = torch.empty_like(residual)
    tensors = x, weight, weight if bias is None else in_pairs(bias), residual, y, peers.bases, peers.times
    run(tensors, (x.numel() // weight.shape[1], float(scale)))
    return y


def serves_linear_sum(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> bool:
    """Whether this may be done at once. A compiler, which can't know more, is given `linear_sum_of`."""
    alike = residual.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    return serves(x, weight) and weight.shape[0] % 8 == 0 and alike


def _none(tensors: Sequence[Tensor], numbers: Sequence[Any]) -> None:
    """There is no kernel."""


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, peers: Peers) -> Any:
    """What launches such products, or `None`."""
    from fms.kernels.gpu import linear_sum as kernels

    m = machine(x.device)
    if m is None or not serves_linear_sum(x, weight, bias, residual):
        return None
    n, k = weight.shape
    rows = x.numel() // k
    made = choose(rows, n, k, 0, False, m)
    if made is None or made.form == "walk" or made.sizes["BN"] < 2:
        return None
    chosen, tiles = made.sizes, made.form == "tile"
    programs, met = -(-n // chosen["BN"]), products(peers, tiles)
    if not tiles:
        programs = min(programs, chosen["GRID"])
    each = chosen["BN"] * chosen["M"] // 2 if tiles else -(-n // (programs * chosen["BN"])) * chosen["BN"]
    if programs > met["PROGRAMS"] or each > met["PAIRS"]:
        return None

    def sizes() -> Sizes:
        named = {"N": n, "K": k, **chosen, **met, "BIAS": bias is not None, "EARLY": m.early, "num_warps": made.warps}
        return (programs,), named if tiles else named | {"GRID": programs, "maxnreg": made.registers(m)}

    key = power(rows), n, k, programs, bias is None, peers.rank, peers.size, room(peers.size)
    return repeated(kernels.tile_sum if tiles else kernels.stream_sum, sizes, key)


def _linear_sum(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, group: str, scale: float) -> Tensor:
    peers = peers_of[group]
    y = linear_sum(x, weight, bias, residual, peers, scale)
    if y is not None:
        return y
    y = few_rows(x, weight, None, 0, None, None, 0.0, 0, False, None, 1.0)
    return sum_add(y, peers, residual, scale, bias)


def _like(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, group: str, scale: float) -> Tensor:
    return residual.new_empty(residual.shape)


linear_sum_of = define("linear_sum", _linear_sum, _like)
