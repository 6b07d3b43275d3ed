"""The collectives of a tensor-parallel group, differentiable and counted.

`torch.distributed`'s own calls are used in plain execution, its functional ones while compiling. Neither is left to
autograd, which gives an all-reduce another all-reduce as its gradient.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

_ops = torch.ops._c10d_functional
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on


class Communicator:
    """A group of ranks that hold one model. `counts` has how often each collective ran, and the bytes that went in."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.name = group, group.group_name
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.counts: Counter[str] = Counter()

    def local(self, parameter: Any, partial: bool = False) -> Any:
        if not isinstance(parameter, DTensor):
            return parameter
        if torch.compiler.is_compiling():
            return parameter.to_local(grad_placements=[Partial()] if partial else None)
        if torch.is_grad_enabled() and parameter.requires_grad:
            return _Local.apply(parameter, self if partial else None)
        return parameter._local_tensor

    def enter(self, x: Tensor) -> Tensor:
        return _Enter.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else x

    def leave(self, x: Tensor) -> Tensor:
        return _Leave.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.sum(x)

    def join(self, x: Tensor) -> Tensor:
        return _Join.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.gather(x)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, which it may overwrite."""
        x = x.contiguous()
        if torch.compiler.is_compiling():
            return _ops.wait_tensor(_ops.all_reduce(x, "sum", self.name))
        self._count("all_reduce", x)
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x, of one shape, one after the other along the last dimension."""
        flat = x.movedim(-1, 0).contiguous()
        if torch.compiler.is_compiling():
            whole = _ops.wait_tensor(_ops.all_gather_into_tensor(flat, self.size, self.name))
        else:
            self._count("all_gather", x)
            whole = flat.new_empty(self.size * flat.shape[0], *flat.shape[1:])
            _all_gather(whole, flat, group=self.group)
        return whole.movedim(0, -1)

    def _count(self, what: str, x: Tensor) -> None:
        self.counts[what] += 1
        self.counts[f"{what} bytes"] += x.nbytes


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: DTensor, partial: Communicator | None) -> Tensor:
        ctx.spec, ctx.partial = parameter._spec, partial
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[DTensor, None]:
        if ctx.partial is not None:
            gradient = ctx.partial.sum(gradient.clone())
        return DTensor(gradient, ctx.spec, requires_grad=False), None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.sum(gradient.clone()), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        return comm.sum(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm, ctx.width = comm, x.shape[-1]
        return comm.gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, ctx.comm.rank * ctx.width, ctx.width).contiguous(), None
