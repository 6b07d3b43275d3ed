"""The collectives of a tensor-parallel group, differentiable and counted.

`torch.distributed`'s own calls are used in plain execution, its functional ones while compiling. Neither is left to
autograd, which gives an all-reduce another all-reduce as its gradient.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

_ops = torch.ops._c10d_functional
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
FEW = 128  # tokens a row below which, without gradients, sharing them out costs more than it saves


class Communicator:
    """A group of ranks that hold one model. `counts` has how often each collective ran, and the bytes that went in.

    With `sequence_parallel` the ranks share out the tokens between sub-layers (Korthikanti et al. 2022, arXiv
    2205.05198): `enter` gathers them, `leave` sums and scatters them again. A row of s tokens makes shares of
    ceil(s / ranks), the last ones with padding, which is dropped where they are gathered.
    """

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool = False):
        self.group, self.name = group, group.group_name
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sequence_parallel = sequence_parallel
        self.tokens: int | None = None
        self.counts: Counter[str] = Counter()
        self._options = dist.AllreduceOptions()
        self._options.asyncOp = False

    def local(self, parameter: Any, partial: bool = False) -> Any:
        if not isinstance(parameter, DTensor) or len(parameter._spec.placements) > 1:  # FSDP's, at rest
            return parameter
        if torch.compiler.is_compiling():
            return parameter.to_local(grad_placements=[Partial()] if partial else None)
        if torch.is_grad_enabled() and parameter.requires_grad:
            return _Local.apply(parameter, self if partial else None)
        return parameter._local_tensor

    def begin(self, tokens: int) -> None:
        shared = self.sequence_parallel and (tokens >= FEW or (torch.is_grad_enabled() and tokens > 1))
        self.tokens = tokens if shared else None

    def enter(self, x: Tensor) -> Tensor:
        return self.same(x) if self.tokens is None else self._collect(x, True)

    def leave(self, x: Tensor) -> Tensor:
        if self.tokens is None:
            return _Leave.apply(x, self) if _differentiable(x) else self.sum(x)
        return _Scatter.apply(x, self, True) if _differentiable(x) else self.share(x, True)

    def same(self, x: Tensor) -> Tensor:
        return _Same.apply(x, self) if _differentiable(x) else x

    def scatter(self, x: Tensor) -> Tensor:
        if self.tokens is None:
            return x
        return _Scatter.apply(x, self, False) if _differentiable(x) else self.share(x, False)

    def collect(self, x: Tensor) -> Tensor:
        return x if self.tokens is None else self._collect(x, False)

    def _collect(self, x: Tensor, parts: bool) -> Tensor:
        assert self.tokens is not None
        return _Collect.apply(x, self, self.tokens, parts) if _differentiable(x) else self.whole(x, self.tokens)

    @contextmanager
    def apart(self, device: torch.device) -> Iterator[None]:
        if torch.compiler.is_compiling():  # which can't change generators: the ranks drop alike
            yield
            return
        seed = int(torch.randint(2**62, ()))  # the same on all
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield

    def join(self, x: Tensor) -> Tensor:
        return _Join.apply(x, self) if _differentiable(x) else self.gather(x)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, which it may overwrite."""
        x = x.contiguous()
        if torch.compiler.is_compiling():
            return _ops.wait_tensor(_ops.all_reduce(x, "sum", self.name))
        self._count("all_reduce", x)
        work = self.group.allreduce([x], self._options)  # half the host's time of dist.all_reduce
        if work is not None:
            work.wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x, of one shape, one after the other along the last dimension."""
        return self._gathered(x.movedim(-1, 0)).movedim(0, -1)

    def whole(self, x: Tensor, tokens: int) -> Tensor:
        """The `tokens` of each row, of which x (b, share, ...) has this rank's."""
        return self._gathered(x.movedim(1, 0))[:tokens].movedim(0, 1)

    def share(self, x: Tensor, parts: bool) -> Tensor:
        """This rank's tokens of x (b, s, ...), which is the same on all ranks, or the sum of their `parts`."""
        n = -(-x.shape[1] // self.size)
        rows = x.movedim(1, 0)
        rows = F.pad(rows, (0, 0) * (x.dim() - 1) + (0, n * self.size - len(rows)))
        if not parts:
            return rows.narrow(0, self.rank * n, n).movedim(0, 1)
        rows = rows.contiguous()
        if torch.compiler.is_compiling():
            return _ops.wait_tensor(_ops.reduce_scatter_tensor(rows, "sum", self.size, self.name)).movedim(0, 1)
        self._count("reduce_scatter", rows)
        share = rows.new_empty(n, *rows.shape[1:])
        _reduce_scatter(share, rows, group=self.group)
        return share.movedim(0, 1)

    def _gathered(self, rows: Tensor) -> Tensor:
        """All ranks' rows."""
        rows = rows.contiguous()
        if torch.compiler.is_compiling():
            return _ops.wait_tensor(_ops.all_gather_into_tensor(rows, self.size, self.name))
        self._count("all_gather", rows)
        whole = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        _all_gather(whole, rows, group=self.group)
        return whole

    def _count(self, what: str, x: Tensor) -> None:
        self.counts[what] += 1
        self.counts[f"{what} bytes"] += x.nbytes


def _differentiable(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


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


class _Same(torch.autograd.Function):
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


class _Collect(torch.autograd.Function):
    """`parts`: what follows differs from rank to rank, so that gradients are parts of a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, tokens: int, parts: bool) -> Tensor:
        ctx.comm, ctx.parts = comm, parts
        return comm.whole(x, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.comm.share(gradient, ctx.parts), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, parts: bool) -> Tensor:
        ctx.comm, ctx.tokens = comm, x.shape[1]
        return comm.share(x, parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.whole(gradient, ctx.tokens), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm, ctx.width = comm, x.shape[-1]
        return comm.gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, ctx.comm.rank * ctx.width, ctx.width).contiguous(), None
