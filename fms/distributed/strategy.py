"""Where each parameter of a model lives."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fms.distributed.communicator import Communicator
from fms.modules.tp import WORDS, Entered, Repeated, form
from fms.utils.tp_plan import pad_model, plan_for

log = logging.getLogger(__name__)
UNEVEN = ("embed", "head")  # vocabularies: ranks know how to hold fewer rows, or none


class TensorParallel:
    """Each rank of a mesh of one dimension holds a share of every large weight, as the model's plan says.

    `plan` changes words of the model's own plan. With `sequence_parallel` the ranks also share out the tokens between
    sub-layers, while training and in prefills of some hundred tokens. Heads or channels that do not divide are padded
    with zeros, for inference; with `pad=False`, as training needs it, they are a `ValueError`.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        plan: Mapping[str, str] | None = None,
        sequence_parallel: bool = False,
        pad: bool = True,
    ):
        if mesh.ndim != 1:
            raise ValueError(f"tensor parallelism wants a mesh of one dimension, this has {mesh.ndim}: {mesh}")
        self.mesh, self.overrides, self.pad = mesh, plan, pad
        self.comm = Communicator(mesh.get_group(), mesh.device_type, sequence_parallel)

    def place(self, model: Any) -> None:
        """Make each parameter a DTensor, and each module the form of its word.

        Parameters are on the meta device, or whole on every rank. Raises `ValueError` if the model can't be split so.
        """
        if self.pad and (padded := pad_model(model, self.comm.size)):
            if self.comm.rank == 0:
                log.warning("split over %d ranks, for inference only: %s", self.comm.size, "; ".join(padded))
            model.requires_grad_(False)
        placed: dict[int, nn.Parameter] = {}
        for name, word in plan_for(model, self.comm.size, self.overrides).items():
            module: Any = model.get_submodule(name)
            if WORDS[word][0] is None:
                continue
            self._share(name, module, word, placed)
            module.__class__ = form(word, module.__class__)
            module.comm = self.comm
            if isinstance(module, Repeated):
                module.rows = self._rows_of(model.get_submodule(name.rpartition(".")[0]), module)
        for module in model.modules():
            if isinstance(module, Entered):
                module.split = [(part, leaf) for part in module.modules() for leaf in getattr(part, "shards", ())]
        model.comm = self.comm

    def _share(self, name: str, module: Any, word: str, placed: dict[int, nn.Parameter]) -> None:
        parameters = list(module.named_parameters(recurse=False))
        if parameters:
            module.shards = {}
        for leaf, parameter in parameters:
            dim = WORDS[word][1].get(leaf)
            if dim is not None and word not in UNEVEN and parameter.shape[dim] % self.comm.size:
                raise ValueError(
                    f"tp_plan: {name} is {word!r}, but {parameter.shape[dim]} along dimension {dim} of its {leaf} "
                    f"can't be split over {self.comm.size} ranks"
                )
            index = self._slices(parameter, dim)
            if dim is not None:
                module.shards[leaf] = index
            if id(parameter) not in placed:
                placed[id(parameter)] = nn.Parameter(self._distributed(parameter, dim, index), parameter.requires_grad)
            one: Any = placed[id(parameter)]
            if one.placements != (_placement(dim),):
                raise ValueError(f"tp_plan: {name} is {word!r}, but its {leaf} is tied to one that is placed otherwise")
            module.register_parameter(leaf, one)

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
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(shard, self.mesh, [_placement(dim)], run_check=False, shape=shape, stride=stride)

    def _rows_of(self, attention: Any, module: Any) -> slice:
        """Those of the one key or value head that this rank's query heads read."""
        head = self.comm.rank * attention.kvheads // self.comm.size
        return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def _placement(dim: int | None) -> Replicate | Shard:
    return Replicate() if dim is None else Shard(dim)


def mesh_of(group: DeviceMesh | dist.ProcessGroup | None, device: torch.device) -> DeviceMesh:
    """The ranks of a group, or all there are, as a mesh; of a mesh with several axes the one called tp."""
    if isinstance(group, DeviceMesh):
        return group["tp"] if group.ndim > 1 and "tp" in (group.mesh_dim_names or ()) else group
    if not dist.is_initialized():
        raise ValueError("distributed_strategy='tp' needs several processes: start the program with torchrun")
    if group is not None:
        return DeviceMesh.from_group(group, device.type, mesh_dim_names=("tp",))
    return DeviceMesh(device.type, list(range(dist.get_world_size())), mesh_dim_names=("tp",))
