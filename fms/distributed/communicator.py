"""The collectives of a tensor-parallel group, differentiable and counted.

`torch.distributed`'s own calls are used in plain execution, its functional ones while compiling. Neither is left to
autograd, which gives an all-reduce another all-reduce as its gradient.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from fms.distributed.symmetric import SymmetricMemory, set_up
from fms.kernels.sum_add import Peers
from fms.kernels.weights import Weights

log = logging.getLogger(__name__)
_ops = torch.ops._c10d_functional
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
FEW = 128  # tokens a row below which, without gradients, sharing them out costs more than it saves


SWITCH = "FMS_COMMUNICATOR"  # the environment's: "auto", "symm_mem", or the group's own backend ("nccl", "gloo")


class Communicator:
    """A group of ranks that hold one model. `counts` has of each collective how often it ran, and the bytes that went
    in. One rank alone communicates nothing.

    Sums of bf16 and fp32 between GPUs of one kind in one machine go through symmetric memory, where that can be had
    and they are not too large, all else through the group's own backend. $FMS_COMMUNICATOR overrules it; the log tells.

    With `sequence_parallel` the ranks share out the tokens between sub-layers (Korthikanti et al. 2022, arXiv
    2205.05198): `enter` gathers them, `leave` sums and scatters them again. The b * s tokens of all rows make
    shares of ceil(b * s / ranks), the last ones with padding, which is dropped where they are gathered.
    """

    def __init__(self, group: dist.ProcessGroup, device_type: str = "cpu", sequence_parallel: bool = False):
        self.group, self.name = group, group.group_name
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sequence_parallel = sequence_parallel and self.size > 1
        self.tokens: tuple[int, int] | None = None
        self.opened: dict[int, Tensor] = {}
        self.counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        # asked directly: the group's own call costs the host several times as much
        self._backend: Any = group._get_backend(torch.device(device_type))
        self._options = dist.AllreduceOptions()
        self._options.asyncOp = False
        self.symmetric = self._choose(device_type)

    def _choose(self, device_type: str) -> SymmetricMemory | None:
        """What sums go through besides the backend. All ranks come to the same."""
        backend, asked = self.backend, os.environ.get(SWITCH) or "auto"
        if asked not in ("auto", "symm_mem", backend):
            raise ValueError(f"{SWITCH}={asked} is none of auto, symm_mem, {backend}")
        symmetric, why = None, f"{SWITCH}={asked}"
        if asked != backend and self.size > 1:
            symmetric, why = set_up(self.group, device_type)
            if symmetric is None and asked == "symm_mem":
                raise ValueError(f"{SWITCH}=symm_mem: {why}")
        if self.size > 1 and self.rank == 0:
            how = f"{backend} ({why})" if symmetric is None else f"{symmetric}, {backend} for the rest"
            log.info("%d ranks sum by %s", self.size, how)
        return symmetric

    def local(self, parameter: Any, partial: bool = False) -> Any:
        if self.opened and (shard := self.opened.get(id(parameter))) is not None:
            return shard
        if not isinstance(parameter, DTensor) or len(parameter._spec.placements) > 1:  # FSDP's, at rest
            return parameter
        if torch.compiler.is_compiling():
            return parameter.to_local(grad_placements=[Partial()] if partial else None)
        if torch.is_grad_enabled() and parameter.requires_grad:
            return _Local.apply(parameter, self if partial else None)
        return parameter._local_tensor

    def begin(self, rows: int, tokens: int) -> None:
        shared = self.sequence_parallel and (tokens >= FEW or (torch.is_grad_enabled() and tokens > 1))
        self.tokens = (rows, tokens) if shared else None

    def enter(self, x: Tensor, split: Sequence[tuple[nn.Module, str]] = ()) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            parameters: list[Any] = [module._parameters[name] for module, name in split]
            parameters = [p for p in parameters if isinstance(p, DTensor) and p.requires_grad]
            if parameters and parameters[0]._spec.mesh.ndim == 1:
                # one step of autograd for all: steps cost the host as much as products do
                x, *shards = _Enter.apply(self, x, *parameters)
                self.opened = dict(zip(map(id, parameters), shards, strict=True))
                return x
        return self.same(x) if self.tokens is None else self._collect(x, True)

    def close(self) -> None:
        self.opened = {}

    def leave(self, x: Tensor) -> Tensor:
        if self.tokens is None:
            return _Leave.apply(x, self) if _differentiable(x) else self.sum(x)
        return _Scatter.apply(x, self, True) if _differentiable(x) else self.share(x, True)

    def leave_add(self, x: Tensor, residual: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
        if self.tokens is None and (symmetric := self._symmetric(x)) is not None:
            return symmetric.sum(x.contiguous(), residual, scale, bias)
        x = self.leave(x)
        return torch.add(residual, x if bias is None else x + bias, alpha=scale)

    def linear_add(self, x: Tensor, linear: Weights, residual: Tensor, scale: float = 1.0) -> Tensor | None:
        if self.tokens is not None or (symmetric := self.symmetric) is None:
            return None
        y = symmetric.linear_sum(x, linear.weight, linear.bias, residual, scale)
        if y is not None and not torch.compiler.is_compiling():
            self._count_symmetric(y)
        return y

    @property
    def peers(self) -> Peers | None:
        """What our own kernels reach the other ranks by."""
        return None if self.symmetric is None else self.symmetric.peers

    @property
    def backend(self) -> str:
        return self._backend.name()  # a group may have one for each kind of device

    @property
    def through_backend(self) -> int:
        """How many collectives went through the backend. Compiled ones are not counted."""
        every = sum(n for name, (n, _) in self.counts.items() if not name.endswith(" by symm_mem"))
        return every - self.counts["all_reduce by symm_mem"][0]

    def same(self, x: Tensor) -> Tensor:
        return _Same.apply(x, self) if _differentiable(x) else x

    def scatter(self, x: Tensor) -> Tensor:
        if self.tokens is None:
            return x
        x = x.expand(*self.tokens, *x.shape[2:])  # positions may be those of all rows
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
        if self.size == 1:
            return x
        x = x.contiguous()
        if (symmetric := self._symmetric(x)) is not None:
            return symmetric.sum(x)
        if torch.compiler.is_compiling():
            return _ops.wait_tensor(_ops.all_reduce(x, "sum", self.name))
        self._count("all_reduce", x)
        if (work := self._backend.allreduce([x], self._options)) is not None:  # NCCL waits by itself
            work.wait()
        return x

    def _symmetric(self, x: Tensor) -> SymmetricMemory | None:
        """Symmetric memory, if the sum of x goes through it, which is counted."""
        if self.symmetric is None:
            return None
        if torch.compiler.is_compiling():
            return self.symmetric if self.symmetric.adds(x) else None
        if not self.symmetric.takes(x):
            return None
        self._count_symmetric(x)
        return self.symmetric

    def _count_symmetric(self, x: Tensor) -> None:
        self._count("all_reduce", x)
        self._count("all_reduce by symm_mem", x)

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x, of one shape, one after the other along the last dimension."""
        return self._gathered(x.movedim(-1, 0)).movedim(0, -1)

    def whole(self, x: Tensor, tokens: tuple[int, int]) -> Tensor:
        """All `tokens` (b, s), of which x (1, share, ...) has this rank's: row after row, so that none are moved."""
        rows, each = tokens
        return self._gathered(x.flatten(0, 1))[: rows * each].unflatten(0, (rows, each))

    def share(self, x: Tensor, parts: bool) -> Tensor:
        """This rank's tokens of x (b, s, ...), which is the same on all ranks, or the sum of their `parts`."""
        rows = x.flatten(0, 1)
        n = -(-len(rows) // self.size)
        rows = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, n * self.size - len(rows)))
        if not parts:
            return rows.narrow(0, self.rank * n, n)[None]
        rows = rows.contiguous()
        if torch.compiler.is_compiling():
            return _ops.wait_tensor(_ops.reduce_scatter_tensor(rows, "sum", self.size, self.name))[None]
        self._count("reduce_scatter", rows)
        share = rows.new_empty(n, *rows.shape[1:])
        reduce_scatter(share, rows, group=self.group)
        return share[None]

    def _gathered(self, rows: Tensor) -> Tensor:
        """All ranks' rows."""
        if self.size == 1:
            return rows
        rows = rows.contiguous()
        if torch.compiler.is_compiling():
            return _ops.wait_tensor(_ops.all_gather_into_tensor(rows, self.size, self.name))
        self._count("all_gather", rows)
        whole = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        all_gather(whole, rows, group=self.group)
        return whole

    def _count(self, what: str, x: Tensor) -> None:
        tally = self.counts[what]
        tally[0] += 1
        tally[1] += x.nbytes


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


class _Enter(torch.autograd.Function):
    """The input of a sub-layer, of all tokens, and the shards of its parameters."""

    @staticmethod
    def forward(ctx: Any, comm: Communicator, x: Tensor, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.comm, ctx.shared, ctx.specs = comm, comm.tokens is not None, [p._spec for p in parameters]
        whole = x.view_as(x) if comm.tokens is None else comm.whole(x, comm.tokens)
        return (whole, *[parameter._local_tensor.detach() for parameter in parameters])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dx = None
        if gradient is not None and ctx.needs_input_grad[1]:
            dx = ctx.comm.share(gradient, True) if ctx.shared else ctx.comm.sum(gradient.clone())
        found = zip(gradients, ctx.specs, strict=True)
        return (None, dx, *[None if g is None else DTensor(g, spec, requires_grad=False) for g, spec in found])


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
        return comm.sum(x.clone())  # x itself may be kept for later: by checkpoints of activations

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Collect(torch.autograd.Function):
    """`parts`: what follows differs from rank to rank, so that gradients are parts of a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, tokens: tuple[int, int], parts: bool) -> Tensor:
        ctx.comm, ctx.parts = comm, parts
        return comm.whole(x, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.comm.share(gradient, ctx.parts), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, parts: bool) -> Tensor:
        ctx.comm, ctx.tokens = comm, (x.shape[0], x.shape[1])
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
