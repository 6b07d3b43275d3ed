"""{sum of parts + copy in another type}: the end of a reduce-scatter whose parts are there."""

import torch
from torch import Tensor

from fms.kernels.launching import HALF, Sizes, machine, start

BLOCK = 2048  # elements a program


def sum_parts(own: Tensor, others: Tensor, rank: int, out: Tensor, scale: float = 1.0) -> None:
    """`out = scale * sum`, in fp32 and the order of ranks, of the others' parts (ranks - 1, n) and one's own (n)."""
    if machine(out.device) is None or not all(t.dtype in (torch.float32, *HALF) for t in (own, out)):
        return reference(own, others, rank, out, scale)
    from fms.kernels.gpu.ranks import sum_parts as kernel

    n = len(own)
    if not n:
        return

    def sizes() -> Sizes:
        named = {"RANK": rank, "RANKS": len(others) + 1, "BLOCK": BLOCK, "num_warps": 8}
        return (-(-n // BLOCK),), named

    start(kernel, (own.contiguous(), others.contiguous(), out), (n, float(scale)), sizes, (n, rank, len(others)))


def reference(own: Tensor, others: Tensor, rank: int, out: Tensor, scale: float) -> None:
    """What the kernel computes, in plain operations."""
    parts = [*others[:rank], own, *others[rank:]]
    total = torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))
    for part in parts:
        total += part
    out.copy_(total * scale)
