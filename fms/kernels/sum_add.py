"""{sum over ranks + residual}: the end of a sub-layer whose weights several ranks share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fms.kernels.launching import HALF, Sizes, machine, repeated
from fms.kernels.ops import define

BLOCK = 1024  # elements a program
BLOCKS = 128  # programs of the largest sum
ROWS = 256  # of a batch whose tokens are chosen together
SLOT = BLOCK * BLOCKS  # elements of parts that carry their count, and up to which each of many ranks adds all of a sum
SHARED = 8192  # elements a program adds at once of more
TURN = 5 << 20  # about as many elements are added of more before their memory is used again
MOST = 1 << 25  # elements up to which it was measured to be faster than NCCL
# Of products that sum as they go the most programs, and of each the most pairs of outputs: of one row or two, of more.
STREAMS, TILES = (1024, 64), (512, 512)
FLAGS = 3 * ROWS * 8  # where in the memory, behind what is said of tokens, the counts of meetings begin
WAIT = 1 << 28  # looks for another rank, of a half to one microsecond each


class Peers(NamedTuple):
    """Ranks of one machine, by memory that each of them addresses: `room(size)` bytes of rank r from `bases[r]` on,
    zero before any of them starts. `times` (int64) counts what this rank has met the others for."""

    bases: Tensor
    times: Tensor
    rank: int
    size: int
    ready: dict[Any, Any]  # what launches a sum of a kind that was asked for before


def parts_at(size: int) -> int:
    """Where, behind the counts, the parts of sums begin: three slots of one of each rank, of eight bytes for each two
    elements."""
    return FLAGS + (BLOCKS + ROWS) * size * 8


def shares_at(size: int) -> int:
    """Where parts of larger sums begin; behind them the sums of shares are, or between two ranks other parts."""
    return parts_at(size) + 3 * size * SLOT * 4


def turn(size: int) -> int:
    """Elements of a round of a larger sum."""
    once = BLOCKS * SHARED * (size if size > 2 else 1)
    return max(TURN // once, 1) * once


def products_at(size: int) -> int:
    """Where parts of products begin, two places for each program of each rank: of one row or two, then of more."""
    return shares_at(size) + 2 * turn(size) * 2


def room(size: int) -> int:
    return products_at(size) + sum(2 * size * programs * pairs * 8 for programs, pairs in (STREAMS, TILES))


def make_peers(addresses: list[int], rank: int, device: torch.device) -> Peers:
    bases = torch.tensor(addresses, dtype=torch.long, device=device)
    times = torch.zeros(BLOCKS + ROWS + STREAMS[0] + TILES[0], dtype=torch.long, device=device)
    return Peers(bases, times, rank, len(addresses), {})


def serves_sum(y: Tensor) -> bool:
    return y.dtype in HALF and 0 < y.numel() <= MOST and y.shape[-1] % 8 == 0


def sum_add(
    y: Tensor, peers: Peers, residual: Tensor | None = None, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """`residual + scale * (sum of y over ranks + bias)`, the same bits on all ranks: y and residual (..., n), bias (n),
    of one dtype. NaN where another rank has not come for minutes."""
    assert residual is None or residual.dtype == y.dtype
    assert bias is None or bias.dtype == y.dtype
    y, n, width = in_pairs(y), y.numel(), y.shape[-1]
    out = torch.empty_like(y)
    tensors = y, y if residual is None else in_pairs(residual), y if bias is None else in_pairs(bias), out
    whole = n <= SLOT
    ranks = peers.size if peers.size > 2 else 1  # that share the additions
    programs = -(-n // BLOCK) if whole else min(-(-n // (SHARED * ranks)), BLOCKS)
    kind = whole, programs, width, residual is None, bias is None
    run = peers.ready.get((y.dtype, *kind))
    if run is None:
        run = peers.ready[y.dtype, *kind] = _prepare(peers, *kind)
    run((*tensors, peers.bases, peers.times), (n // 8, float(scale)))
    return out


def _prepare(peers: Peers, whole: bool, programs: int, width: int, alone: bool, bare: bool) -> Any:
    """What launches such sums, `alone` without a residual and `bare` without a bias."""
    from fms.kernels.gpu import ranks as kernels

    known = machine(peers.bases.device)
    assert known is not None
    size, met = peers.size, meeting(peers)

    def sizes() -> Sizes:
        named = {"WIDTH": width, **met, "EARLY": known.early, "ADD": not alone, "BIAS": not bare}
        if whole:
            return (programs,), named | {"BLOCK": BLOCK, "SLOT": SLOT, "PARTS": parts_at(size), "num_warps": 4}
        named |= {"PARTS": shares_at(size), "FLAGS": FLAGS, "BLOCK": SHARED, "ROUND": turn(size), "num_warps": 16}
        others = {"SUMS": shares_at(size) + turn(size) * 2} if size > 2 else {"BLOCKS": BLOCKS}
        return (programs,), named | others

    larger = kernels.sum_add_shared if size > 2 else kernels.sum_add_once
    kernel = kernels.sum_add if whole else larger
    return repeated(kernel, sizes, (programs, width, peers.rank, size, alone, bare, room(size)))


def in_pairs(x: Tensor) -> Tensor:
    """x, or a copy, whose elements can be read two at a time."""
    x = x.contiguous()
    return x if x.data_ptr() % 4 == 0 else x.clone()


def meeting(peers: Peers | None) -> dict[str, int]:
    """What kernels in which ranks meet are compiled for."""
    rank, size = (0, 1) if peers is None else (peers.rank, peers.size)
    return {"RANK": rank, "RANKS": size, "WAIT": WAIT}


def products(peers: Peers, tiles: bool) -> dict[str, int]:
    """The same of products that sum as they go, and where their places and counts are."""
    parts, times, (programs, pairs) = products_at(peers.size), BLOCKS + ROWS, STREAMS
    if tiles:
        parts, times, (programs, pairs) = parts + 2 * peers.size * programs * pairs * 8, times + programs, TILES
    return {"PROGRAMS": programs, "PAIRS": pairs, "PARTS": parts, "TIMES": times} | meeting(peers)


peers_of: dict[str, Peers] = {}  # by the name of their group, as a compiled graph has no other handle


def _sum_add(y: Tensor, group: str, residual: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    return sum_add(y, peers_of[group], residual, scale, bias)


sum_add_of = define("sum_add", _sum_add, lambda y, group, residual, scale, bias: y.new_empty(y.shape))
