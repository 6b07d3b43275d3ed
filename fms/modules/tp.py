"""The words of a tensor-parallel plan, and what a module becomes under each.

A module says in `tp_plan(tp)` what becomes of it and of its parts:
`{"": "enter", "query": "colwise", "dense": "rowwise"}`. A strategy makes the parameters DTensors, so that whoever
looks at a model from outside sees whole tensors, and gives each named module the form of its word: a subclass whose
`weight` and `bias` are this rank's shards, plain tensors, and which calls a communicator. Neither knows of processes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms.kernels.sum_add import Peers
from fms.kernels.weights import Weights

Plan = dict[str, str]  # a part's name ("" is the module itself) to its word


class Communicator(Protocol):
    """What the forms need of the ranks that share a model. Its calls are differentiable."""

    rank: int
    size: int
    tokens: tuple[int, int] | None  # (b, s), where ranks share them out between sub-layers: each holds (1, share)

    def begin(self, rows: int, tokens: int) -> None:
        """A forward of so many rows of so many tokens begins."""

    def local(self, parameter: Any, partial: bool = False) -> Any:
        """The shard of a parameter; `partial` if its gradient here is only a part of the sum over ranks."""

    def enter(self, x: Tensor, split: Sequence[tuple[nn.Module, str]] = ()) -> Tensor:
        """x (b, s, ...) of all tokens; its gradient is summed over ranks. `local` will be asked for the parameters of
        `split`, none of them partial, until `close`."""

    def close(self) -> None:
        """The end of what was entered."""

    def leave(self, x: Tensor) -> Tensor:
        """The sum over ranks of x (b, s, ...), of this rank's tokens (1, share, ...) where ranks share them out; its
        gradient is the same for each."""

    def leave_add(self, x: Tensor, residual: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
        """`residual + scale * (leave(x) + bias)`, without a gradient."""

    def linear_add(self, x: Tensor, linear: Weights, residual: Tensor, scale: float = 1.0) -> Tensor | None:
        """`leave_add` of x times the weight, with the bias, where one kernel does it, else `None`."""

    @property
    def peers(self) -> Peers | None:
        """What kernels in which ranks meet reach the others by, where there are such."""

    @property
    def backend(self) -> str:
        """The name of what sums go through in the end: "nccl", "gloo"."""

    def scatter(self, x: Tensor) -> Tensor:
        """Of x (b, s, ...), which all ranks have, this rank's tokens."""

    def same(self, x: Tensor) -> Tensor:
        """x, which all ranks have; its gradient is summed over ranks."""

    def apart(self, device: torch.device) -> AbstractContextManager[None]:
        """Random numbers that differ from rank to rank; afterwards they are the same again."""

    def collect(self, x: Tensor) -> Tensor:
        """All tokens of which each rank has some: `scatter` undone."""

    def join(self, x: Tensor) -> Tensor:
        """All ranks' x one after the other along the last dimension."""

    def gather(self, x: Tensor) -> Tensor:
        """The same, without a gradient."""


def resharded(parameter: Any, shard: Tensor) -> Tensor:
    """`shard` as a tensor that is sharded as `parameter` is, or as it is if that is an ordinary one."""
    if not hasattr(parameter, "_spec"):
        return shard
    return type(parameter)(shard, parameter._spec, requires_grad=False)


class Entered(nn.Module):
    """A sub-layer: its input is entered, once for all that read it; `split` has its parts' parameters that are."""

    comm: Communicator
    split: Sequence[tuple[nn.Module, str]] = ()

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = self.comm.enter(x, self.split)
        try:
            return super().forward(x, *args)
        finally:
            self.comm.close()


class Summed(Entered):
    """A sub-layer whose parts give parts of the sum."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.comm.leave(super().forward(x, *args))


class Sharded(nn.Module):
    """A module whose weight and bias are shards; `shards` has the slices that this rank holds of what is split."""

    comm: Communicator
    shards: dict[str, tuple[slice, ...]]

    @property
    def partial(self) -> bool:
        """Whether gradients here are parts of a sum over ranks."""
        return False

    def shard(self, name: str) -> Any:
        parameter = self._parameters[name]
        return None if parameter is None else self.comm.local(parameter, self.partial)

    @property
    def weight(self) -> Any:
        return self.shard("weight")

    @property
    def bias(self) -> Any:
        return self.shard("bias")


class Partial(Sharded):
    """Computed by every rank on what all have, used by each on what it has: its gradient is a part of the sum."""

    partial = True


class Norm(Sharded):
    """Between sub-layers: on this rank's tokens, where ranks share them out."""

    @property
    def partial(self) -> bool:
        return self.comm.tokens is not None


class LastNorm(Norm):
    """The end of the last sub-layer: what follows has all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.comm.collect(super().forward(x))


class Scattered(Sharded):
    """What is added to this rank's tokens, computed for all."""

    def forward(self, *args: Tensor) -> Tensor:
        return self.comm.scatter(super().forward(*args))


class Dropout(nn.Module):
    """Between sub-layers: where ranks share out the tokens each drops others."""

    comm: Communicator
    p: float

    def forward(self, x: Tensor) -> Tensor:
        if self.comm.tokens is None or not (self.training and self.p):
            return super().forward(x)
        with self.comm.apart(x.device):
            return super().forward(x)


class Addend(Sharded):
    """Columns of a linear layer: shard in, a part of the sum out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Rowwise(Addend):
    """Columns of a linear layer: shard in, the sum over ranks out; the bias is added once, after it."""

    @property
    def bias(self) -> Any:
        bias = self._parameters["bias"]
        return None if bias is None else self.comm.local(bias, self.comm.tokens is not None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.comm.leave(super().forward(x))
        return y if self.bias is None else y + self.bias


class Repeated(Partial):
    """Fewer heads than ranks: each rank holds all of them and computes the one that its query heads read."""

    rows: slice

    def shard(self, name: str) -> Any:
        whole = super().shard(name)
        return whole if whole is self._parameters[name] else whole[self.rows]  # itself: none, or at rest


class VocabEmbedding(Sharded):
    """Rows of the table: each rank looks up the ids that it holds, the sum over ranks has them all."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        weight, first = self.weight, self.shards["weight"][0].start
        if not len(weight):  # more ranks than rows
            return self.comm.leave(weight.new_zeros(*ids.shape, self.embedding_dim))
        ids = ids - first
        elsewhere = (ids < 0) | (ids >= len(weight))
        pad = None if self.padding_idx is None else self.padding_idx - first
        pad = pad if pad is not None and 0 <= pad < len(weight) else None
        found = F.embedding(ids.masked_fill(elsewhere, 0), weight, pad)
        return self.comm.leave(found.masked_fill(elsewhere[..., None], 0))


class VocabHead(Sharded):
    """Rows of the projection to the vocabulary: `local` gives this rank's logits, the call gathers them."""

    out_features: int

    def local(self, h: Tensor) -> Tensor:
        return super().local(self.comm.same(h))  # type: ignore[misc]

    @property
    def share(self) -> int:
        """How many rows each rank has, but for the last ones, which may have fewer."""
        return -(-self.out_features // self.comm.size)

    def forward(self, h: Tensor, use: Callable[[Tensor, Any], Tensor] | None = None) -> Tensor:
        if use is not None:
            return use(h, self)
        logits = self.local(h)
        return self.comm.join(F.pad(logits, (0, self.share - logits.shape[-1])))[..., : self.out_features]


class ShardedExperts(Sharded):
    """Experts split along their hidden dimension."""

    @property
    def wg(self) -> Any:
        return self.shard("wg")

    @property
    def w1(self) -> Any:
        return self.shard("w1")

    @property
    def w2(self) -> Any:
        return self.shard("w2")


class WholeExperts(ShardedExperts):
    """Some of the experts, whole. Rows for experts elsewhere go through the last one here, and count nothing: what a
    rank computes does not depend on what is chosen, and the host need not know."""

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        here = self.shards["w2"][0]
        elsewhere = (chosen < here.start) | (chosen >= here.stop)
        chosen = (chosen - here.start).masked_fill(elsewhere, here.stop - here.start - 1)
        return super().forward(x, weights.masked_fill(elsewhere, 0), chosen)


# A word: what is mixed into the module's class, and the dimension along which each parameter is split, if it is.
WORDS: dict[str, tuple[type[nn.Module] | None, dict[str, int]]] = {
    "enter": (Entered, {}),
    "summed": (Summed, {}),
    "within": (None, {}),  # it is part of one whose input is entered
    "colwise": (Sharded, {"weight": 0, "bias": 0}),
    "rowwise": (Rowwise, {"weight": 1}),
    "addend": (Addend, {"weight": 1}),
    "embed": (VocabEmbedding, {"weight": 0}),
    "head": (VocabHead, {"weight": 0, "bias": 0}),
    "experts": (ShardedExperts, {"wg": 1, "w1": 1, "w2": 2}),
    "whole_experts": (WholeExperts, {"wg": 0, "w1": 0, "w2": 0}),
    "replicate": (Repeated, {}),
    "partial": (Partial, {}),
    "norm": (Norm, {}),
    "last_norm": (LastNorm, {}),
    "scatter": (Scattered, {}),
    "dropout": (Dropout, {}),
    "whole": (Sharded, {}),
}


@cache
def form(word: str, kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of class `kind` becomes under a word."""
    mixin = WORDS[word][0]
    return kind if mixin is None else type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


def embedded(model: Any, input_ids: Tensor) -> Tensor:
    """The embeddings of ids (b, s), or those given, (b, s, emb_dim): of this rank's tokens where ranks share them out.

    A model's first step: `model.comm` is told how many tokens there are.
    """
    if model.comm is not None:
        model.comm.begin(*input_ids.shape[:2])
    if not input_ids.is_floating_point():
        return model.embedding(input_ids)
    return input_ids if model.comm is None else model.comm.scatter(input_ids)


def pad(module: Any, name: str, dim: int, size: int) -> None:
    """Append zeros to a parameter, if it is there; `module.unpadded` keeps its shape."""
    parameter = module._parameters[name]
    if parameter is not None and size > parameter.shape[dim]:
        module.__dict__.setdefault("unpadded", {})[name] = tuple(parameter.shape)
        zeros = parameter.new_zeros(*parameter.shape[:dim], size - parameter.shape[dim], *parameter.shape[dim + 1 :])
        module.register_parameter(name, nn.Parameter(torch.cat((parameter.detach(), zeros), dim), False))


def pad_outputs(*linears: nn.Linear, size: int) -> None:
    for linear in linears:
        pad(linear, "weight", 0, size)
        pad(linear, "bias", 0, size)
        linear.out_features = size


def pad_inputs(linear: nn.Linear, size: int) -> None:
    pad(linear, "weight", 1, size)
    linear.in_features = size


def unpadded(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a parameter without the zeros that `pad` appended."""
    return getattr(module, "unpadded", {}).get(name) or tuple(module._parameters[name].shape)  # type: ignore[union-attr]


def shard_of(module: nn.Module, name: str, read: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
    """This rank's share of a parameter of which `read` gives slices, all of it for (); zeros where it was padded."""
    index = getattr(module, "shards", {}).get(name, ())
    if name not in getattr(module, "unpadded", {}):
        return read(index)
    inside = tuple(slice(min(s.start, n), min(s.stop, n)) for s, n in zip(index, unpadded(module, name), strict=False))
    piece = read(inside)
    missing = [(s.stop - s.start) - (i.stop - i.start) for s, i in zip(index, inside, strict=True)]
    missing += [0] * (piece.dim() - len(missing))
    return F.pad(piece, [n for m in reversed(missing) for n in (0, m)])


def rounded(count: int, tp: int) -> int:
    """`count` or the next multiple of `tp`."""
    return -(-count // tp) * tp


def divided(what: str, count: int, tp: int) -> int:
    """`count` over `tp` ranks. Raises `ValueError`, with both numbers, if it does not divide."""
    if count % tp:
        raise ValueError(f"{count} {what} can't be split over {tp} ranks")
    return count // tp
