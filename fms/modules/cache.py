"""Keys and values of tokens already seen. State is an argument: a model holds none of it.

The contract that a model relies on: `cache.advance(n)` makes room for n more tokens a row and returns their positions
(1 or b, n) and the mask they need (None: causal among themselves with nothing before, or where layers are `later` with
others before, or a single token that sees all);
`cache.layers[i].update(k, v)` stores the new keys and values (b, kvheads, n, head_dim) and returns all to attend to;
`cache.take`, where a cache has it, says how many of the next pass's tokens each row really has, the rest being padding
on its right; it holds for one pass. `cache.span` is how long the sequences may get, an int or one a row (b, 1), for
rotary frequencies that depend on it, or `None` where that is not known.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fms.kernels.attend import LayerCache, Place, Scratch, Step, serves_flash, serves_step


def visible(positions: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """Which keys a token sees: those not behind it and, with a window, nearer than that many places.

    Positions (b or 1, n) and those of keys (b or 1, kv) give a mask (b or 1, 1, n, kv).
    """
    ahead = positions[:, None, :, None] - keys[:, None, None, :]
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


class Cache(Protocol):
    @property
    def layers(self) -> Sequence[LayerCache | None]: ...
    @property
    def span(self) -> int | Tensor | None: ...
    def advance(self, n: int) -> tuple[Tensor, Tensor | None]: ...


class StaticLayer:
    """One layer's buffers, (b, kvheads, max_len, head_dim)."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.first = self.end = 0
        self.slots: tuple[Tensor, Tensor] | None = None  # rows (b, 1) and their slots (b, n), where rows differ
        self.later = False  # the pass needs no mask to see what is before it
        self.step: Step | None = None  # where the pass is of one token a row, and there is a kernel for that

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.slots is None:
            self.k.narrow(2, self.first, k.shape[2]).copy_(k)
            self.v.narrow(2, self.first, v.shape[2]).copy_(v)
        else:
            rows, slots = self.slots
            self.k[rows, :, slots] = k.transpose(1, 2)
            self.v[rows, :, slots] = v.transpose(1, 2)
        return self.filled()

    def place(self, x: Tensor) -> Place | None:
        fits = self.slots is None and len(x) == len(self.k) and x.dtype == self.k.dtype
        return (self.k, self.v, self.first) if fits else None

    def filled(self) -> tuple[Tensor, Tensor]:
        return self.k.narrow(2, 0, self.end), self.v.narrow(2, 0, self.end)


class RowLengths:
    """How many tokens each row of a cache holds."""

    def __init__(self, batch: int, max_len: int, device: torch.device):
        self.batch, self.max_len, self.device = batch, max_len, device
        self.length = 0  # of the longest row
        self.lengths: Tensor | None = None  # (b, 1), where rows differ
        self.take: Tensor | None = None  # (b, 1)
        self.span: int | Tensor = max_len
        self.rows = torch.arange(batch, device=device)[:, None]
        self.steady = False  # passes are of one token at `lengths`, and whoever set this moves those on, on the device

    def hold(self, lengths: Sequence[int]) -> None:
        """Say that rows hold these numbers of tokens, whoever put them there."""
        self.length, self.steady, self.take = max(lengths), False, None
        equal = min(lengths) == self.length
        self.lengths = None if equal else torch.tensor(lengths, device=self.device)[:, None]

    def held(self) -> list[int]:
        """How many tokens each row has."""
        return [self.length] * self.batch if self.lengths is None else self.lengths.flatten().tolist()


class StaticCache(RowLengths):
    """Buffers allocated once for `batch` rows of at most `max_len` tokens. A token's slot is its position. On a GPU our
    own kernel attends to them where `group` says how many query heads share a key head.

    Rows may hold different numbers of tokens: shorter inputs are padded on the right and `take` says by how much. What
    padding writes lies behind a row's own tokens, where it is never attended to and the row's next tokens overwrite it.
    """

    def __init__(
        self,
        batch: int,
        max_len: int,
        nlayers: int,
        kvheads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: int | None = None,
    ):
        super().__init__(batch, max_len, torch.device(device))
        self.layers = [StaticLayer((batch, kvheads, max_len, head_dim), dtype, self.device) for _ in range(nlayers)]
        keys = self.layers[0].k
        self.scratch = Scratch(keys, group) if group and serves_step(keys) else None
        self.later = serves_flash(keys)

    def advance(self, n: int) -> tuple[Tensor, Tensor | None]:
        first, end = (0, self.max_len) if self.steady else (self.length, self.length + n)
        if end > self.max_len:
            raise ValueError(f"{first} tokens in the cache and {n} new ones are more than its max_len={self.max_len}")
        slots, mask, step, later = None, None, None, False
        serves = self.scratch is not None and n == 1
        if self.lengths is None:
            positions = (torch.arange(n, device=self.device) + first)[None]
            later = self.later and first > 0 and n > 1
            if first and n > 1 and not later:
                mask = visible(positions, torch.arange(end, device=self.device)[None])
        else:
            positions = self.lengths if n == 1 else self.lengths + torch.arange(n, device=self.device)
            slots = self.rows, positions
            if not serves:
                mask = visible(positions, torch.arange(end, device=self.device)[None])
        if serves:
            assert self.scratch is not None
            step = Step(positions.flatten(), self.max_len, self.scratch, even=self.lengths is None)
        for layer in self.layers:
            layer.first, layer.end, layer.slots, layer.step, layer.later = first, end, slots, step, later
        if self.steady:
            return positions, mask
        if self.lengths is not None or self.take is not None:
            self.lengths = positions[:, :1] + (n if self.take is None else self.take)
        self.length, self.take = end, None
        return positions, mask

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[row]` tokens of each row."""
        held = self.held()
        if len(lengths) != self.batch or any(not 0 <= new <= old for new, old in zip(lengths, held, strict=True)):
            raise ValueError(f"cannot rewind rows of {held} tokens to {list(lengths)}")
        self.hold(lengths)


class Recompute:
    """No cache: every pass starts anew. Carries only the `span` that a cached run of the same sequences would have."""

    def __init__(self, nlayers: int, span: int | Tensor, device: torch.device | str = "cpu", window: int | None = None):
        self.layers = [None] * nlayers
        self.span, self.device, self.window = span, device, window

    def advance(self, n: int) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(n, device=self.device)[None]
        past = self.window is not None and n > self.window
        return positions, visible(positions, positions, self.window) if past else None
