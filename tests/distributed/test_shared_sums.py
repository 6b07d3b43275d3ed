"""The kernels that sum over ranks, by Triton's interpreter in processes that share memory and wait for each other."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fms.distributed.communicator import Communicator
from fms.distributed.symmetric import SymmetricMemory
from fms.kernels import launching, linear_sum, sum_add
from fms.modules.frozen import Frozen, Fused
from tests.distributed.ranks import Ranks

SHAPES = ((1, 8), (3, 40), (1, 1, 1000), (2, 7, 96))  # the last two are larger, and of several rounds
PRODUCTS = ((1, 1, 64, 40), (2, 1, 40, 96), (1, 2, 200, 72), (3, 2, 300, 40), (1, 20, 64, 72))  # rows of rows, in, out
Found = list[tuple[Tensor, Tensor]]  # what this rank got, and what it should be

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set")


def sharing(mesh: Any, folder: str, name: str) -> Found:
    """One of the works below, on what is as a GPU: a few multiprocessors, memory that all ranks address."""
    work: Callable[[Any, sum_add.Peers], Found] = {"summed": summed, "multiplied": multiplied}[name]
    kept = sum_add.BLOCK, sum_add.BLOCKS, sum_add.SLOT, sum_add.SHARED, sum_add.TURN
    sum_add.BLOCK, sum_add.BLOCKS, sum_add.SLOT, sum_add.SHARED, sum_add.TURN = 32, 4, 128, 16, 300
    cpu, serves = torch.device("cpu"), linear_sum.serves
    machine, launching._machines[cpu] = launching._machines.get(cpu), launching.Machine(4, False)
    linear_sum.serves = lambda x, w: x.dtype == torch.float16 and w.is_contiguous()
    try:
        room = sum_add.room(mesh.size())
        memory = [
            torch.from_file(f"{folder}/{r}", shared=True, size=room, dtype=torch.uint8) for r in range(mesh.size())
        ]
        return work(mesh, sum_add.make_peers([m.data_ptr() for m in memory], mesh.get_local_rank(), cpu))
    finally:
        sum_add.BLOCK, sum_add.BLOCKS, sum_add.SLOT, sum_add.SHARED, sum_add.TURN = kept
        launching._machines[cpu], linear_sum.serves = machine, serves


def summed(mesh: Any, peers: sum_add.Peers) -> Found:
    found: Found = []
    for n, shape in enumerate(SHAPES * 2):
        torch.manual_seed(n)
        parts, residual, bias = torch.randn(peers.size, *shape), torch.randn(shape), torch.randn(shape[-1])
        parts, residual, bias = parts.half(), residual.half(), bias.half()
        more = (residual, 0.5, bias) if n % 3 else ()
        total = parts.float().sum(0)
        want = residual.float() + 0.5 * (total + bias.float()) if more else total
        found.append((sum_add.sum_add(parts[peers.rank], peers, *more), want))
    return found


def multiplied(mesh: Any, peers: sum_add.Peers) -> Found:
    comm = Communicator(mesh.get_group())
    comm.symmetric = SymmetricMemory.__new__(SymmetricMemory)
    comm.symmetric.peers = peers
    comm.leave_add = None  # type: ignore[assignment, method-assign]  # nothing is left to be summed
    block: Any = SimpleNamespace(comm=comm)
    found: Found = []
    for turn, (b, s, k, n) in enumerate(PRODUCTS * 2):
        torch.manual_seed(turn)
        x, weight = torch.randn(peers.size, b, s, k).half(), (torch.randn(peers.size, n, k) / 8).half()
        residual, bias = torch.randn(b, s, n).half(), torch.randn(n).half()
        linear = Fused(weight[peers.rank].clone(), bias if turn % 2 else None)
        total = sum(F.linear(x[r].float(), weight[r].float()) for r in range(peers.size))
        got = Frozen.end(block, x[peers.rank].clone(), linear, residual, 0.5)
        found.append((got, residual.float() + 0.5 * (total + bias.float() if turn % 2 else total)))
        found.append((sum_add.sum_add(residual, peers), peers.size * residual.float()))  # in between
    assert comm.counts["all_reduce by symm_mem"][0] == comm.counts["all_reduce"][0] == 2 * len(PRODUCTS)
    assert comm.through_backend == 0
    mine = x[peers.rank]
    many, learning, other = mine.repeat(2, 2, 1), mine.clone().requires_grad_(), mine.float()
    for refused, before in ((many, residual), (learning, residual), (other, residual), (mine, residual.float())):
        assert comm.linear_add(refused, linear, before) is None
    assert comm.linear_add(mine, Fused(linear.weight, bias.float()), residual) is None
    linear.weight = weight[0].T.contiguous().T
    assert comm.linear_add(mine, linear, residual) is None
    return found


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize("work", ["summed", "multiplied"])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_processes(ranks: Ranks, size: int, work: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for rank in range(size):
        with (tmp_path / str(rank)).open("wb") as file:
            file.truncate(1 << 22)
    each = ranks.run(size, sharing, str(tmp_path), work)
    for found in zip(*each, strict=True):
        for got, want in found:
            torch.testing.assert_close(got.float(), want, rtol=3e-3, atol=5e-3)
            assert torch.equal(got, found[0][0])
