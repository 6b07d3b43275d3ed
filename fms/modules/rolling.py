"""A cache for attention through a sliding window: it holds a window's tokens, however long the sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fms.kernels.attend import Scratch, Step, serves_step
from fms.modules.cache import RowLengths, visible


class RollingLayer:
    """One layer's ring, (b, kvheads, window + 1, head_dim): position p in slot p % window; the last slot is waste."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.slot, self.held = 0, 0
        self.slots: tuple[Tensor, Tensor] | None = None  # rows (b, 1) and the slots (b, n) that new tokens go to
        self.single = False  # one token a row: what it replaces has left the window
        self.step: Step | None = None  # where there is a kernel for that

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = self.k.narrow(2, 0, self.held), self.v.narrow(2, 0, self.held)
        if not self.single:
            before = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
        if self.slots is None:
            self.k.narrow(2, self.slot, 1).copy_(k)
            self.v.narrow(2, self.slot, 1).copy_(v)
        else:
            rows, slots = self.slots
            self.k[rows, :, slots] = k.transpose(1, 2)
            self.v[rows, :, slots] = v.transpose(1, 2)
        return before


class RollingCache(RowLengths):
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
        group: int | None = None,
    ):
        super().__init__(batch, max_len, torch.device(device))
        self.window = window
        shape = (batch, kvheads, window + 1, head_dim)
        self.layers = [RollingLayer(shape, dtype, self.device) for _ in range(nlayers)]
        keys = self.layers[0].k.narrow(2, 0, window)
        self.scratch = Scratch(keys, group) if group and serves_step(keys) else None

    def advance(self, n: int) -> tuple[Tensor, Tensor | None]:
        first, window = self.max_len - n if self.steady else self.length, self.window
        if first + n > self.max_len:
            raise ValueError(f"{first} tokens in the cache and {n} new ones are more than its max_len={self.max_len}")
        if n == 1:
            return self._advance_by_one(first, min(first + 1, window))
        steps = torch.arange(n, device=self.device)
        start = torch.full((self.batch, 1), first, device=self.device) if self.lengths is None else self.lengths
        count = n if self.take is None else self.take
        positions = start + steps
        slots = torch.arange(min(first, window), device=self.device)
        keys = start - 1 - (start - 1 - slots) % window  # the position that each slot holds
        keys = torch.where(keys < 0, self.max_len, keys)  # none yet: in no one's past
        mask = visible(positions, torch.cat((keys, positions), 1), window)
        kept = (steps < count) & (steps >= count - window)  # neither padding nor overwritten by what follows
        targets = torch.where(kept, positions % window, window)
        for layer in self.layers:
            layer.held, layer.slots, layer.single, layer.step = len(slots), (self.rows, targets), False, None
        if self.lengths is not None or self.take is not None:
            self.lengths = start + count
        self.length, self.take = first + n, None
        return positions, mask

    def _advance_by_one(self, first: int, held: int) -> tuple[Tensor, Tensor | None]:
        even = self.lengths is None
        positions = torch.full((1, 1), first, device=self.device) if self.lengths is None else self.lengths
        step = None if self.scratch is None else Step(positions.flatten(), self.window, self.scratch, even)
        slots = None if even else (self.rows, positions % self.window)
        for layer in self.layers:
            layer.slot, layer.held, layer.slots, layer.single, layer.step = first % self.window, held, slots, True, step
        if not self.steady:
            if self.lengths is not None or self.take is not None:
                self.lengths = positions + (1 if self.take is None else self.take)
            self.length, self.take = first + 1, None
        if even or step is not None:
            return positions, None
        return positions, (torch.arange(held, device=self.device) <= positions)[:, None, None]

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
        self.hold(lengths)
