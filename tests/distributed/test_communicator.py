"""Through what ranks sum: the backend or symmetric memory, by size and type; the switch; what is counted and told."""

import logging
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fms.distributed import symmetric
from fms.distributed.communicator import SWITCH, Communicator
from fms.models import freeze
from fms.utils.generation import generate
from tests.distributed.ranks import Ranks
from tests.distributed.test_tensor_parallel import random_model, some_ids


def alone(mesh: Any, sequence_parallel: bool) -> tuple[Tensor, Tensor, dict[str, list[int]]]:
    model = random_model("llama", mesh, sequence_parallel)
    model(some_ids(2, 9)).square().mean().backward()
    gradient: Any = model.layers[0].attn.dense._parameters["weight"].grad
    freeze(model)
    return gradient.full_tensor(), generate(model, some_ids(2, 9), max_new_tokens=3), dict(model.comm.counts)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "tokens too"])
def test_one_rank_communicates_nothing(ranks: Ranks, sequence_parallel: bool) -> None:
    model = random_model("llama")
    model(some_ids(2, 9)).square().mean().backward()
    ((gradient, tokens, counts),) = ranks.run(1, alone, sequence_parallel)
    torch.testing.assert_close(gradient, model.layers[0].attn.dense.weight.grad)
    assert torch.equal(tokens, generate(model, some_ids(2, 9), max_new_tokens=3))
    assert counts == {}


def told(mesh: Any, asked: str) -> tuple[str, list[str]]:
    """What a communicator says: its error, and the log."""
    handler, logger = logging.Handler(), logging.getLogger("fms.distributed.communicator")
    lines: list[str] = []
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    os.environ[SWITCH] = asked
    try:
        Communicator(mesh.get_group())
    except ValueError as error:
        return str(error), lines
    finally:
        del os.environ[SWITCH]
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
    return "", lines


@pytest.mark.parametrize(
    ("asked", "error", "line"),
    [
        ("", "", "2 ranks sum by gloo (symmetric memory is between GPUs, not on cpu)"),
        ("gloo", "", "2 ranks sum by gloo (FMS_COMMUNICATOR=gloo)"),
        ("nccl", "FMS_COMMUNICATOR=nccl is none of auto, symm_mem, gloo", ""),
        ("symm_mem", "FMS_COMMUNICATOR=symm_mem: symmetric memory is between GPUs, not on cpu", ""),
    ],
)
def test_the_switch_and_the_log(ranks: Ranks, asked: str, error: str, line: str) -> None:
    first, second = ranks.run(2, told, asked)
    assert first == (error, [line] if line else [])
    assert second == (error, [])


def stood_in(mesh: Any, failing: int, wrong: int) -> Any:
    """Symmetric memory on a CPU: the kernels' places taken by the backend, of one rank broken."""
    group, rank = mesh.get_group(), mesh.get_local_rank()

    def shared(nbytes: int, group: Any, device: torch.device) -> tuple[Tensor, list[int]]:
        if rank == failing:
            raise RuntimeError("no peer access\nC++ trace")
        return torch.zeros(nbytes, dtype=torch.uint8), []

    def two_shot(inside: Tensor, operation: str, name: str) -> Tensor:
        dist.all_reduce(inside, group=group)
        return inside.add_(1) if rank == wrong else inside

    symmetric._shared, symmetric._two_shot = shared, two_shot
    symmetric._one_shot = lambda inside, *_: two_shot(inside.clone(), *_)
    return symmetric._made(group, torch.device("cpu"))


KINDS = [  # type, elements, whether symmetric memory takes it
    (torch.bfloat16, 8, True),
    (torch.float32, 4096, True),
    (torch.bfloat16, 1 << 20, True),
    (torch.float32, 2 << 20, True),
    (torch.float32, (2 << 20) + 4, False),
    (torch.bfloat16, 9, False),
    (torch.float16, 8, False),
    (torch.float64, 8, False),
]


def sums(mesh: Any) -> list[tuple[bool, int, bool]]:
    comm = Communicator(mesh.get_group())
    comm.symmetric, _ = stood_in(mesh, -1, -1)
    seen = []
    for dtype, n, _ in KINDS:
        comm.counts.clear()
        x = torch.arange(n).remainder(7).to(dtype) * (comm.rank + 1)
        y = comm.sum(x.view(2, -1) if n % 2 == 0 else x)
        right = torch.equal(y.flatten(), torch.arange(n).remainder(7).to(dtype) * 3)
        seen.append((right, comm.counts["all_reduce"], comm.counts["all_reduce by symm_mem"]))
    return seen


def test_symmetric_memory_takes_sums_by_type_and_size(ranks: Ranks) -> None:
    for seen in ranks.run(2, sums):
        for (dtype, n, taken), (right, every, through) in zip(KINDS, seen, strict=True):
            assert right, (dtype, n)
            nbytes = n * dtype.itemsize
            assert every == [1, nbytes]
            assert through == ([1, nbytes] if taken else [0, 0]), (dtype, n)


def left_and_added(mesh: Any) -> list[Tensor]:
    comm = Communicator(mesh.get_group())
    comm.symmetric, _ = stood_in(mesh, -1, -1)
    found = []
    for n in (64, 1 << 18):  # by one shot, by two
        x, residual = torch.full((1, 2, n), comm.rank + 1.0), torch.arange(2.0 * n).view(1, 2, n)
        found += [comm.leave_add(x.clone(), residual, 0.5), comm.leave_add(x, residual, 2.0, torch.ones(n))]
    assert comm.counts["all_reduce by symm_mem"][0] == comm.counts["all_reduce"][0] == 4
    assert comm.through_backend == 0
    comm.gather(residual)
    assert comm.through_backend == 1
    return found


def test_a_sum_is_added_to_the_residual(ranks: Ranks) -> None:
    for found in ranks.run(2, left_and_added):
        for y, (scale, more) in zip(found, [(0.5, 3.0), (2.0, 4.0)] * 2, strict=True):
            torch.testing.assert_close(y, torch.arange(y.numel(), dtype=y.dtype).view(y.shape) + scale * more)


def reason(mesh: Any, failing: int, wrong: int) -> tuple[bool, str]:
    made, why = stood_in(mesh, failing, wrong)
    return made is None, why


@pytest.mark.parametrize(
    ("failing", "wrong", "why"),
    [
        (1, -1, "symmetric memory: no peer access"),
        (-1, 0, "symmetric memory: a wrong sum of 16 bytes of torch.bfloat16"),
    ],
)
def test_what_one_rank_can_not_no_rank_does(ranks: Ranks, failing: int, wrong: int, why: str) -> None:
    assert ranks.run(2, reason, failing, wrong) == [(True, why)] * 2


class WaitsByItself:
    """A backend as NCCL's: a call that is not asynchronous returns nothing to wait for."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def allreduce(self, tensors: list[Tensor], options: Any) -> None:
        assert not options.asyncOp
        dist.all_reduce(tensors[0], group=self.group)


def summed_by_such(mesh: Any) -> list[float]:
    comm = Communicator(mesh.get_group())
    comm._backend = WaitsByItself(comm.group)
    return comm.sum(torch.full((3,), comm.rank + 1.0)).tolist()


def test_a_backend_may_wait_by_itself(ranks: Ranks) -> None:
    assert ranks.run(2, summed_by_such) == [[3.0] * 3] * 2
