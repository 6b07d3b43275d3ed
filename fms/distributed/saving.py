"""Saving a model that is split over ranks: all gather one tensor at a time, the first of them writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def save_together(parameters: Mapping[str, Tensor], write: Callable[[Callable[[str], Tensor]], Path]) -> Path:
    """What `write(whole)` returns on the first rank; `whole(name)` is a parameter that all ranks gather.

    All ranks of the mesh, axes of data included, call this and leave together. A failure of `write` is raised by all:
    by the others as a `ValueError` or a `RuntimeError` with its message.
    Ranks wait for the first one's disk no longer than their group's timeout.
    """
    mesh: Any = next(p.device_mesh for p in parameters.values() if isinstance(p, DTensor))
    everybody = mesh._get_root_mesh().size() == dist.get_world_size()
    group: Any = dist.group.WORLD if everybody else mesh.get_group()
    first = dist.get_global_rank(group, 0)

    def share(said: tuple[str, Any]) -> tuple[str, Any]:
        box = [said]
        dist.broadcast_object_list(box, src=first, group=group)
        return box[0]

    def whole(name: str) -> Tensor:
        share(("gather", name))
        return _whole(parameters[name])

    if dist.get_rank() == first:
        try:
            path = write(whole)
        except Exception as error:
            share(("value" if isinstance(error, ValueError) else "failure", str(error)))
            raise
        return share(("done", path))[1]
    while True:
        what, value = share(("", None))
        if what == "gather":
            _whole(parameters[value])
        elif what == "done":
            return value
        else:
            raise (ValueError if what == "value" else RuntimeError)(f"rank {first}, which writes: {value}")


def _whole(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
