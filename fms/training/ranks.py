"""Few words between the ranks of a run: sums, and what the first rank decides for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(x: Tensor) -> Tensor:
    """x, made the sum over all ranks in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def agreed(decide: Callable[[], T]) -> T:
    """What `decide` gives on the first rank, for all; what it raises there is raised on all."""
    if not dist.is_initialized():
        return decide()
    told: list[Any] = [None]
    if rank() == 0:
        try:
            told = [(decide(), None)]
        except Exception as failure:  # of whatever kind: the others wait for it
            told = [(None, failure)]
    dist.broadcast_object_list(told)
    value, error = told[0]
    if error is not None:
        raise error
    return value
