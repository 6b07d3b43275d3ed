"""A cache for attention through a sliding window: it holds a window's tokens, however long the sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fms.modules.cache import visible


class RollingLayer:
    """One layer's ring, (b, kvheads, window + 1, head_dim): position p in slot p % window; the last slot is waste."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.slot, self.held = 0, 0
        self.slots: tuple[Tensor, Tensor] | None = None  # rows (b, 1) and the slots (b, n) that new tokens go to

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.slots is None:  # one token a row, all in the same slot: what it replaces has left the window
            self.k.narrow(2, self.slot, 1).copy_(k)
            self.v.narrow(2, self.slot, 1).copy_(v)
            return self.k.narrow(2, 0, self.held), self.v.narrow(2, 0, self.held)
        keys = torch.cat((self.k.narrow(2, 0, self.held), k), 2)
        values = torch.cat((self.v.narrow(2, 0, self.held), v), 2)
        rows, slots = self.slots
        self.k[rows, :, slots] = k.transpose(1, 2)
        self.v[rows, :, slots] = v.transpose(1, 2)
        return keys, values


class RollingCache:
    """Keys and values of the last `window` tokens of each of `batch` rows, for sequences of up to `max_len`.

    As `StaticCache`, but what has left the window is gone: `rewind` past it raises `ValueError`.
    """

    def __init__(
        self,
        batch: int,
        max_len: int,
        window: int,
        nlayers: int,
        kvheads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.batch, self.max_len, self.window, self.device = batch, max_len, window, torch.device(device)
        shape = (batch, kvheads, window + 1, head_dim)
        self.layers = [RollingLayer(shape, dtype, self.device) for _ in range(nlayers)]
        self.length = 0  # of the longest row
        self.lengths: Tensor | None = None  # (b, 1), where rows differ
        self.take: Tensor | None = None  # (b, 1)
        self.span: int | Tensor = max_len

    def advance(self, n: int) -> tuple[Tensor, Tensor | None]:
        first, window = self.length, self.window
        if first + n > self.max_len:
            raise ValueError(f"{first} tokens in the cache and {n} new ones are more than its max_len={self.max_len}")
        steps = torch.arange(n, device=self.device)
        if self.lengths is None and self.take is None and n == 1:
            for layer in self.layers:
                layer.slot, layer.held, layer.slots = first % window, min(first + 1, window), None
            self.length += 1
            return (steps + first)[None], None
        start = torch.full((self.batch, 1), first, device=self.device) if self.lengths is None else self.lengths
        count = n if self.take is None else self.take
        positions = start + steps
        slots = torch.arange(min(first, window), device=self.device)
        keys = start - 1 - (start - 1 - slots) % window  # the position that each slot holds
        keys = torch.where(keys < 0, self.max_len, keys)  # none yet: in no one's past
        mask = visible(positions, torch.cat((keys, positions), 1), window)
        kept = (steps < count) & (steps >= count - window)  # neither padding nor overwritten by what follows
        targets = torch.where(kept, positions % window, window)
        rows = torch.arange(self.batch, device=self.device)[:, None]
        for layer in self.layers:
            layer.held, layer.slots = len(slots), (rows, targets)
        if self.lengths is not None or self.take is not None:
            self.lengths = start + count
        self.length, self.take = first + n, None
        return positions, mask

    def held(self) -> list[int]:
        """How many tokens each row has had."""
        return [self.length] * self.batch if self.lengths is None else self.lengths.flatten().tolist()

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[row]` tokens of each row, as long as none has left the window."""
        held = self.held()
        if list(lengths) == held:
            self.length = max(held)
            return
        if self.length > self.window:
            raise ValueError(
                f"rows of {held} tokens: a window of {self.window} no longer has what {list(lengths)} need"
            )
        if len(lengths) != self.batch or any(not 0 <= new <= old for new, old in zip(lengths, held, strict=True)):
            raise ValueError(f"cannot rewind rows of {held} tokens to {list(lengths)}")
        self.length = max(lengths)
        equal = min(lengths) == self.length
        self.lengths = None if equal else torch.tensor(lengths, device=self.device)[:, None]
