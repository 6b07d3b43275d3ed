"""The words of a tensor-parallel plan, and what a module becomes under each.

A module says in `tp_plan(tp)` what becomes of it and of its parts:
`{"": "enter", "query": "colwise", "dense": "rowwise"}`. A strategy makes the parameters DTensors, so that whoever
looks at a model from outside sees whole tensors, and gives each named module the form of its word: a subclass whose
`weight` and `bias` are this rank's shards, plain tensors, and which calls a communicator. Neither knows of processes.
"""

from functools import cache
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

Plan = dict[str, str]  # a part's name ("" is the module itself) to its word


class Communicator(Protocol):
    """What the forms need of the ranks that share a model. Its calls are differentiable."""

    rank: int
    size: int

    def local(self, parameter: Any, partial: bool = False) -> Any:
        """The shard of a parameter; `partial` if its gradient here is only a part of the sum over ranks."""

    def enter(self, x: Tensor) -> Tensor:
        """The same; its gradient is summed over ranks."""

    def leave(self, x: Tensor) -> Tensor:
        """The sum over ranks; its gradient is the same for each."""

    def join(self, x: Tensor) -> Tensor:
        """All ranks' x one after the other along the last dimension."""

    def gather(self, x: Tensor) -> Tensor:
        """The same, without a gradient."""


def resharded(parameter: Any, shard: Tensor) -> Tensor:
    """`shard` as a tensor that is sharded as `parameter` is, or as it is if that is an ordinary one."""
    if not hasattr(parameter, "_spec"):
        return shard
    return type(parameter)(shard, parameter._spec, requires_grad=False)


class Sharded(nn.Module):
    """A module whose weight and bias are shards; `shards` has the slices that this rank holds of what is split."""

    comm: Communicator
    shards: dict[str, tuple[slice, ...]]
    partial = False

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


class Rowwise(Sharded):
    """Columns of a linear layer: shard in, the sum over ranks out; the bias is added once, after it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.comm.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class Repeated(Partial):
    """Fewer heads than ranks: each rank holds all of them and computes the one that its query heads read."""

    rows: slice

    def shard(self, name: str) -> Any:
        whole = super().shard(name)
        return None if whole is None else whole[self.rows]


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
        return super().local(self.comm.enter(h))  # type: ignore[misc]

    @property
    def share(self) -> int:
        """How many rows each rank has, but for the last ones, which may have fewer."""
        return -(-self.out_features // self.comm.size)

    def forward(self, h: Tensor) -> Tensor:
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

    def forward(self, *args: Tensor) -> Tensor:
        return self.comm.leave(super().forward(*args))


# A word: what is mixed into the module's class, and the dimension along which each parameter is split, if it is.
WORDS: dict[str, tuple[type[Sharded] | None, dict[str, int]]] = {
    "enter": (None, {}),  # its input is entered, once for all that read it
    "within": (None, {}),  # it is part of one whose input is entered
    "colwise": (Sharded, {"weight": 0, "bias": 0}),
    "rowwise": (Rowwise, {"weight": 1}),
    "embed": (VocabEmbedding, {"weight": 0}),
    "head": (VocabHead, {"weight": 0, "bias": 0}),
    "experts": (ShardedExperts, {"wg": 1, "w1": 1, "w2": 2}),
    "replicate": (Repeated, {}),
    "partial": (Partial, {}),
    "whole": (Sharded, {}),
}


@cache
def form(word: str, kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of class `kind` becomes under a word."""
    mixin = WORDS[word][0]
    return kind if mixin is None else type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})


def divided(what: str, count: int, tp: int) -> int:
    """`count` over `tp` ranks. Raises `ValueError`, with both numbers, if it does not divide."""
    if count % tp:
        raise ValueError(f"{count} {what} can't be split over {tp} ranks")
    return count // tp
