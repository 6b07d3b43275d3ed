"""Where each parameter of a model lives."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fms.distributed.communicator import Communicator
from fms.modules.tp import WORDS, Repeated, form
from fms.utils.tp_plan import plan_for


class TensorParallel:
    """Each rank of a mesh of one dimension holds a share of every large weight, as the model's plan says.

    `plan` changes words of the model's own plan.
    """

    def __init__(self, mesh: DeviceMesh, plan: Mapping[str, str] | None = None):
        if mesh.ndim != 1:
            raise ValueError(f"tensor parallelism wants a mesh of one dimension, this has {mesh.ndim}: {mesh}")
        self.mesh, self.overrides = mesh, plan
        self.comm = Communicator(mesh.get_group())

    def place(self, model: Any) -> None:
        """Make each parameter a DTensor, and each module the form of its word.

        Parameters are on the meta device, or whole on every rank. Raises `ValueError` if the model can't be split so.
        """
        placed: dict[int, nn.Parameter] = {}
        for name, word in plan_for(model, self.comm.size, self.overrides).items():
            module: Any = model.get_submodule(name)
            if word in ("enter", "within"):
                if word == "enter":
                    module.register_forward_pre_hook(self._enter)
                continue
            self._share(module, word, placed)
            module.__class__ = form(word, module.__class__)
            module.comm = self.comm
            if isinstance(module, Repeated):
                module.rows = self._rows_of(model.get_submodule(name.rpartition(".")[0]), module)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.comm.enter(args[0]), *args[1:]

    def _share(self, module: Any, word: str, placed: dict[int, nn.Parameter]) -> None:
        module.shards = {}
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            dim = WORDS[word][1].get(leaf)
            index = self._slices(parameter, dim)
            if dim is not None:
                module.shards[leaf] = index
            if id(parameter) not in placed:
                placed[id(parameter)] = nn.Parameter(self._distributed(parameter, dim, index), parameter.requires_grad)
            module.register_parameter(leaf, placed[id(parameter)])

    def _slices(self, parameter: Tensor, dim: int | None) -> tuple[slice, ...]:
        """As DTensor splits: equal shares, the last ones smaller or empty."""
        if dim is None:
            return ()
        size = parameter.shape[dim]
        share = -(-size // self.comm.size)
        first = min(share * self.comm.rank, size)
        return (*[slice(0, n) for n in parameter.shape[:dim]], slice(first, min(first + share, size)))

    def _distributed(self, parameter: Tensor, dim: int | None, index: tuple[slice, ...]) -> DTensor:
        shard = parameter.detach()[index].contiguous()
        placement = Replicate() if dim is None else Shard(dim)
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(shard, self.mesh, [placement], run_check=False, shape=shape, stride=stride)

    def _rows_of(self, attention: Any, module: Any) -> slice:
        """Those of the one key or value head that this rank's query heads read."""
        head = self.comm.rank * attention.kvheads // self.comm.size
        return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def mesh_of(group: DeviceMesh | dist.ProcessGroup | None, device: torch.device) -> DeviceMesh:
    """The ranks of a group, or all there are, as a mesh; a mesh stays as it is."""
    if isinstance(group, DeviceMesh):
        return group
    if not dist.is_initialized():
        raise ValueError("distributed_strategy='tp' needs several processes: start the program with torchrun")
    if group is not None:
        return DeviceMesh.from_group(group, device.type, mesh_dim_names=("tp",))
    return DeviceMesh(device.type, list(range(dist.get_world_size())), mesh_dim_names=("tp",))
