"""A tensor that grows, and the cache of a chat of unknown length that stands on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Room:
    """Memory that handles share: the first `used` places along the dimension are taken."""

    buffer: Tensor
    used: int


class ExpandableTensor(Tensor):
    """A tensor with room to grow along `dim`.

    `torch.cat((expandable, more), dim)` appends in place while there is room, and doubles the room when there is none,
    so that n appends copy O(n). All else that is done with it gives plain tensors.

    What was appended to stays as it was: appending to an older handle again copies rather than overwrite the newer one.
    """

    _room: _Room
    _dim: int

    def __new__(cls, tensor: Tensor, dim: int = 0, preallocate_length: int | None = None) -> "ExpandableTensor":
        dim = dim % tensor.dim()
        shape = list(tensor.shape)
        shape[dim] = max(shape[dim], preallocate_length or 2 * shape[dim])
        buffer = tensor.new_empty(shape)
        buffer.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        return cls._of(_Room(buffer, tensor.shape[dim]), dim, tensor.shape[dim])

    @classmethod
    def _of(cls, room: _Room, dim: int, length: int) -> "ExpandableTensor":
        handle = room.buffer.narrow(dim, 0, length).as_subclass(cls)
        handle._room, handle._dim = room, dim
        return handle

    def plain(self) -> Tensor:
        """The same memory as an ordinary tensor."""
        return self.as_subclass(Tensor)

    def narrowed(self, length: int) -> "ExpandableTensor":
        """The first `length` places along the dimension, again expandable."""
        if not 0 <= length <= self.shape[self._dim]:
            raise ValueError(f"cannot narrow {self.shape[self._dim]} places to {length}")
        return self._of(self._room, self._dim, length)

    def append(self, more: Tensor) -> "ExpandableTensor":
        length, n = self.shape[self._dim], more.shape[self._dim]
        room, dim = self._room, self._dim
        if room.used != length or length + n > room.buffer.shape[dim]:
            return ExpandableTensor(self.plain(), dim, 2 * (length + n)).append(more)
        room.buffer.narrow(dim, length, n).copy_(more)
        room.used = length + n
        return self._of(room, dim, length + n)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.cat, torch.concat) and (append := _appending(*args, **(kwargs or {}))):
            first, rest = append
            with torch._C.DisableTorchFunctionSubclass():
                for more in rest:
                    first = first.append(more)
                return first
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _appending(tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> tuple[ExpandableTensor, list[Tensor]] | None:
    first, *rest = tensors
    if not isinstance(first, ExpandableTensor) or dim % first.dim() != first._dim:
        return None
    same = all(t.dtype == first.dtype and t.device == first.device for t in rest)
    fits = all(t.shape[i] == n for t in rest for i, n in enumerate(first.shape) if i != first._dim)
    return (first, rest) if same and fits else None


class _GrowingLayer:
    def __init__(self) -> None:
        self.k: ExpandableTensor | None = None
        self.v: ExpandableTensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is None or self.v is None:
            self.k, self.v = ExpandableTensor(k, 2), ExpandableTensor(v, 2)
        else:
            self.k, self.v = self.k.append(k), self.v.append(v)
        return self.k.plain(), self.v.plain()


class GrowingCache:
    """A cache for conversations of unknown length: rows are equally long, memory doubles when it is full.

    Not for rotary frequencies that depend on the final length (`RopeScaling` of kind dynamic), which is not known here.
    """

    max_len = 2**31  # no limit of its own
    span = None

    def __init__(self, nlayers: int, batch: int = 1, device: torch.device | str = "cpu"):
        self.layers = [_GrowingLayer() for _ in range(nlayers)]
        self.batch, self.device, self.length = batch, device, 0

    def advance(self, n: int) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(self.length, self.length + n, device=self.device)[None]
        mask = None
        if self.length and n > 1:
            mask = positions[:, None, :, None] >= torch.arange(self.length + n, device=self.device)
        self.length += n
        return positions, mask

    def held(self) -> list[int]:
        """How many tokens each row has."""
        return [self.length] * self.batch

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first tokens of each row, as many for all."""
        (length,) = set(lengths) if len(set(lengths)) == 1 else (-1,)
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind {self.batch} rows of {self.length} tokens to {list(lengths)}")
        for layer in self.layers:
            if layer.k is not None and layer.v is not None:
                layer.k, layer.v = layer.k.narrowed(length), layer.v.narrowed(length)
        self.length = length
