"""Weight tables: which tensor of a format is which of ours, read both ways.

A table is a list of rules, `(source, target)` or `(source, targets, op)`, of module names with `*` for a layer's
number; `.weight` and `.bias` follow by themselves. A target `None` drops the tensor. Of several rules for one target
the first is the one that is written.

An op says which row of the source each row of a target is: `op(config)` gives an index a target. Splitting a fused
projection, another order of rotary channels and leaving out rows are all such a gather; its inverse is a scatter, and a
slice of a target reads only the source's rows between the least and the greatest that it needs.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.readers import Reader
from fms.utils.serialization.writers import Entry

Index = slice | Tensor
Op = Callable[[Any], Sequence[Index]]
Rule = tuple[str, str | tuple[str, ...] | None] | tuple[str, str | tuple[str, ...], Op]


@dataclass(frozen=True)
class Part:
    """Where one parameter comes from: all rows of a source tensor, or those of an index."""

    key: str
    rows: Index | None = None

    def shape(self, reader: Reader) -> tuple[int, ...]:
        whole = reader.shape(self.key)
        return whole if self.rows is None else (_count(self.rows), *whole[1:])

    @property
    def end(self) -> int:
        """How many rows the source needs to have, where only some are taken."""
        return 0 if self.rows is None else int(_indices(self.rows).max()) + 1

    def read(self, reader: Reader, index: tuple[slice, ...] = ()) -> Tensor:
        """The parameter, or the slice of it that `index` names (one slice a dimension, missing ones whole)."""
        if self.rows is None:
            return reader.read(self.key, index)
        rows = _indices(self.rows)[index[0] if index else slice(None)]
        if not len(rows):
            return reader.read(self.key, (slice(0, 0), *index[1:]))
        first, last = int(rows.min()), int(rows.max())
        block = reader.read(self.key, (slice(first, last + 1), *index[1:]))
        if torch.equal(rows, torch.arange(first, last + 1)):
            return block
        return block[rows - first]


def match(rules: Sequence[Rule], keys: Iterable[str], config: Any) -> tuple[dict[str, Part], list[str]]:
    """The part of the source for each of our names, and the keys that no rule takes."""
    parts: dict[str, Part] = {}
    unknown = []
    for key in keys:
        found = _find(rules, key)
        if found is None:
            unknown.append(key)
            continue
        targets, op = found
        rows = op(config) if op else [None] * len(targets)
        for target, index in zip(targets, rows, strict=True):
            if target in parts:
                raise CheckpointError(f"{target} is given twice, by {parts[target].key} and by {key}")
            parts[target] = Part(key, index)
    return parts, unknown


def entries(rules: Sequence[Rule], state: Sequence[Entry], config: Any) -> list[Entry]:
    """What a format's file holds for our `state`. Raises `CheckpointError` if it has no place for some of it."""
    left = {entry.name: entry for entry in state}
    found = []
    for source, target, *op in rules:
        if target is None:
            continue
        targets = (target,) if isinstance(target, str) else target
        for name in list(left):
            if (m := _pattern(targets[0]).match(name)) is None:
                continue
            *numbers, kind = m.groups()
            names = [_fill(t, numbers, kind) for t in targets]
            if all(n in left for n in names):
                group = [left.pop(n) for n in names]
                found.append(_joined(_fill(source, numbers, kind), group, op[0](config) if op else None))
    if left:
        raise CheckpointError(f"this format has no place for {', '.join(left)}")
    return found


def _joined(name: str, group: list[Entry], rows: Sequence[Index] | None) -> Entry:
    first = group[0]
    if rows is None:
        return first._replace(name=name)
    shape = (sum(entry.shape[0] for entry in group), *first.shape[1:])

    def make() -> Tensor:
        whole = torch.empty(shape, dtype=first.dtype)
        for entry, index in zip(group, rows, strict=True):
            whole[index] = entry.make().cpu()
        return whole

    return Entry(name, shape, first.dtype, make)


def _find(rules: Sequence[Rule], key: str) -> tuple[list[str], Op | None] | None:
    for source, target, *op in rules:
        if (m := _pattern(source).match(key)) is not None:
            *numbers, kind = m.groups()
            targets = [] if target is None else [target] if isinstance(target, str) else target
            return [_fill(t, numbers, kind) for t in targets], op[0] if op else None
    return None


@cache
def _pattern(glob: str) -> re.Pattern:
    return re.compile(re.escape(glob).replace(r"\*", r"(\d+)") + r"(?:\.(weight|bias))?$")


def _fill(glob: str, numbers: Sequence[str], kind: str | None) -> str:
    for number in numbers:
        glob = glob.replace("*", number, 1)
    return glob if kind is None else f"{glob}.{kind}"


def _count(rows: Index) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _indices(rows: Index) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


def neighbours_to_halves(heads: int, head_dim: int) -> Tensor:
    """Rows of a projection whose rotary channels pair as neighbours (0,1), (2,3), ..., in our order: halves."""
    return torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).flatten()
