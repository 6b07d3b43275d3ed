"""The kernels that sum over ranks, by Triton's interpreter in processes that share memory and wait for each other."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fms.kernels import launching, sum_add
from tests.distributed.ranks import Ranks

SHAPES = ((1, 8), (3, 40), (1, 1, 1000), (2, 7, 96))  # the last two are larger, and of several rounds


def summed(mesh: Any, folder: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """This rank's sums and what they should be, twice each, one after the other by the same memory."""
    rank, size = mesh.get_local_rank(), mesh.size()
    kept = sum_add.BLOCK, sum_add.BLOCKS, sum_add.SLOT, sum_add.SHARED, sum_add.TURN
    sum_add.BLOCK, sum_add.BLOCKS, sum_add.SLOT, sum_add.SHARED, sum_add.TURN = 32, 4, 128, 16, 300
    cpu = torch.device("cpu")
    machine, launching._machines[cpu] = launching._machines.get(cpu), launching.Machine(4, False)
    try:
        room = sum_add.room(size)
        memory = [torch.from_file(f"{folder}/{r}", shared=True, size=room, dtype=torch.uint8) for r in range(size)]
        peers = sum_add.make_peers([m.data_ptr() for m in memory], rank, cpu)
        found = []
        for n, shape in enumerate(SHAPES * 2):
            generator = torch.Generator().manual_seed(n)
            parts, residual = torch.randn(size, *shape, generator=generator), torch.randn(shape, generator=generator)
            bias = torch.randn(shape[-1], generator=generator)
            parts, residual, bias = parts.to(dtype), residual.to(dtype), bias.to(dtype)
            more = (residual, 0.5, bias) if n % 3 else ()
            total = parts.float().sum(0)
            want = residual.float() + 0.5 * (total + bias.float()) if more else total
            found.append((sum_add.sum_add(parts[rank], peers, *more), want))
        return found
    finally:
        sum_add.BLOCK, sum_add.BLOCKS, sum_add.SLOT, sum_add.SHARED, sum_add.TURN = kept
        launching._machines[cpu] = machine


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set")
@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_processes(ranks: Ranks, size: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for rank in range(size):
        (tmp_path / str(rank)).write_bytes(bytes(1 << 16))
    each = ranks.run(size, summed, str(tmp_path), torch.float16)
    for found in zip(*each, strict=True):
        for got, want in found:
            torch.testing.assert_close(got.float(), want, rtol=1e-3, atol=2e-3)
            assert torch.equal(got, found[0][0])
