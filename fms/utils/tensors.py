"""A tensor that grows, and the cache of a chat of unknown length that stands on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fms.modules.cache import visible


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

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpandableTensor":
        return ExpandableTensor(self.plain(), self._dim)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.cat, torch.concat, torch.concatenate) and (append := _appending(*args, **(kwargs or {}))):
            first, rest = append
            with torch._C.DisableTorchFunctionSubclass():
                for more in rest:
                    first = first.append(more)
                return first
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _appending(tensors: Sequence[Tensor], dim: int = 0, **others: Any) -> tuple[ExpandableTensor, list[Tensor]] | None:
    """What is appended to, and what is, if `torch.cat` with these arguments can be done in place."""
    first, *rest = tensors
    if others or not isinstance(first, ExpandableTensor) or dim not in (first._dim, first._dim - first.dim()):
        return None
    across = lambda t: (t.dtype, t.device, *t.shape[: first._dim], None, *t.shape[first._dim + 1 :])
    return (first, rest) if all(across(t) == across(first) for t in rest) else None


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
    """A cache for one conversation of unknown length: memory doubles when it is full.

    Not for rotary frequencies that depend on the final length (`RopeScaling` of kind dynamic), which is not known here.
    """

    batch = 1
    max_len = 2**31  # no limit of its own
    span = None

    def __init__(self, nlayers: int, device: torch.device | str = "cpu", window: int | None = None):
        self.layers = [_GrowingLayer() for _ in range(nlayers)]
        self.device, self.window, self.length = device, window, 0

    def advance(self, n: int) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(self.length, self.length + n, device=self.device)[None]
        mask, end = None, self.length + n
        if (self.length and n > 1) or (self.window is not None and end > self.window):
            mask = visible(positions, torch.arange(end, device=self.device)[None], self.window)
        self.length = end
        return positions, mask

    def held(self) -> list[int]:
        """How many tokens it has, as the only row."""
        return [self.length]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[0]` tokens."""
        (length,) = lengths
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a row of {self.length} tokens to {length}")
        for layer in self.layers:
            if layer.k is not None and layer.v is not None:
                layer.k, layer.v = layer.k.narrowed(length), layer.v.narrowed(length)
        self.length = length
