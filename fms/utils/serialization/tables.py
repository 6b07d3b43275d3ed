"""Weight tables: which tensor of a format is which of ours, read both ways.

A table is a list of rules, `(source, target)` or `(source, targets, op)`, of module names with `*` for a layer's
number; `.weight` and `.bias` follow by themselves. A target `None` drops the tensor. Of several rules for one target
the first is the one that is written. Where a source has one `*` more than its target, the tensors that its last one
numbers are stacked along a new first dimension.

An op says which row of the source each row of a target is: `op(config)` gives an index a target, -1 in it being a row
of zeros that the source does not have. Splitting a fused projection, another order of rotary channels and leaving out
rows are all such a gather; its inverse is a scatter, and a slice of a target reads only the source's rows between the
least and the greatest that it needs. `Rows` is an index along another dimension, or one whose result is transposed;
what a list of indexes gives is stacked. The op `twin` marks a second name of the same tensor.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.readers import Reader
from fms.utils.serialization.writers import Entry

Index = slice | Tensor


@dataclass(frozen=True)
class Rows:
    """An index along the dimension `dim` of a source; `turned`, the result is transposed."""

    index: Index
    dim: int = 0
    turned: bool = False


Taken = Index | Rows | list[Index | Rows]
Op = Callable[[Any], Sequence[Taken]]
Rule = tuple[str, str | tuple[str, ...] | None] | tuple[str, str | tuple[str, ...], Op]


def twin(config: Any) -> Sequence[Taken]:
    """For a rule whose tensor the file may hold under a first name too: read where that is missing, written besides."""
    return ()


@dataclass(frozen=True)
class Part:
    """Where one parameter comes from: all of a source tensor, or its rows of an index along `dim`, maybe transposed."""

    key: str
    rows: Index | None = None
    dim: int = 0
    turned: bool = False

    @property
    def pieces(self) -> tuple["Part", ...]:
        return (self,)

    @property
    def end(self) -> int:
        """How many rows the source needs to have, where only some are taken."""
        return 0 if self.rows is None else int(_indices(self.rows).max()) + 1

    def shape(self, reader: Reader) -> tuple[int, ...]:
        shape = reader.shape(self.key)
        if self.rows is not None:
            shape = (*shape[: self.dim], _count(self.rows), *shape[self.dim + 1 :])
        return shape[::-1] if self.turned else shape

    def read(self, reader: Reader, index: tuple[slice, ...] = ()) -> Tensor:
        """The parameter, or the slice of it that `index` names (one slice a dimension, missing ones whole)."""
        if self.turned:
            straight = (*index, slice(None), slice(None))[1::-1]
            return replace(self, turned=False).read(reader, straight).mT.contiguous()
        if self.rows is None:
            return reader.read(self.key, index)
        dim = self.dim
        before, here, after = index[:dim], index[dim : dim + 1] or (slice(None),), index[dim + 1 :]
        before += (slice(None),) * (dim - len(before))
        rows = _indices(self.rows)[here[0]]
        if not (there := rows >= 0).all():
            found = replace(self, rows=rows[there]).read(reader, (*before, slice(None), *after))
            shape = (*found.shape[:dim], len(rows), *found.shape[dim + 1 :])
            return found.new_zeros(shape).index_copy_(dim, there.nonzero().flatten(), found)
        first, end = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        block = reader.read(self.key, (*before, slice(first, end), *after))
        return block if torch.equal(rows, torch.arange(first, end)) else block.index_select(dim, rows - first)


@dataclass(frozen=True)
class Stack(Part):
    """One parameter of several parts, one behind another along a new first dimension; `key` is the first one's."""

    parts: tuple[Part, ...] = ()

    @property
    def pieces(self) -> tuple[Part, ...]:
        return tuple(piece for part in self.parts for piece in part.pieces)

    def shape(self, reader: Reader) -> tuple[int, ...]:
        shape = self.parts[0].shape(reader)
        for part in self.parts:
            if (other := part.shape(reader)) != shape:
                raise CheckpointError(f"{self.key} has shape {list(shape)}, but {part.key} has {list(other)}")
        return len(self.parts), *shape

    def read(self, reader: Reader, index: tuple[slice, ...] = ()) -> Tensor:
        shape = torch.empty(self.shape(reader), device="meta")[index].shape
        whole = torch.empty(shape, dtype=reader.dtype(self.key), device="cpu")
        for row, part in zip(whole, self.parts[index[0]] if index else self.parts, strict=True):
            row.copy_(part.read(reader, index[1:]))
        return whole


def match(rules: Sequence[Rule], keys: Iterable[str], config: Any) -> tuple[dict[str, Part], list[str]]:
    """The part of the source for each of our names, and the keys that no rule takes."""
    parts: dict[str, dict[int | None, Part]] = {}  # by number, where they are to be stacked
    unknown, twins = [], {}
    for key in keys:
        found = _find(rules, key)
        if found is None:
            unknown.append(key)
            continue
        targets, number, op = found
        if op is twin:
            twins[targets[0]] = Part(key)
            continue
        rows = op(config) if op else [None] * len(targets)
        for target, taken in zip(targets, rows, strict=True):
            there = parts.setdefault(target, {})
            same = next(iter(there), None) if number is None else number
            if other := there.get(same) or there.get(None):
                raise CheckpointError(f"{target} is given twice, by {other.key} and by {key}")
            there[number] = _part(key, taken)
    return twins | {target: there.get(None) or _stacked(target, there) for target, there in parts.items()}, unknown


def _part(key: str, taken: Taken | None) -> Part:
    if isinstance(taken, list):
        return Stack(key, parts=tuple(_part(key, rows) for rows in taken))
    if isinstance(taken, Rows):
        return Part(key, taken.index, taken.dim, taken.turned)
    return Part(key, taken)


def _stacked(target: str, there: Mapping[int | None, Part]) -> Stack:
    parts = {number: there[number] for number in sorted(number for number in there if number is not None)}
    first = next(iter(parts.values()))
    if missing := [str(number) for number in range(max(parts)) if number not in parts]:
        raise CheckpointError(
            f"{target} is stacked of tensors like {first.key}: there is no number {', '.join(missing)}"
        )
    return Stack(first.key, parts=tuple(parts.values()))


def entries(rules: Sequence[Rule], state: Sequence[Entry], config: Any) -> list[Entry]:
    """What a format's file holds for our `state`. Raises `CheckpointError` if it has no place for some of it."""
    whole = {entry.name: entry for entry in state}
    left = dict(whole)
    found = []
    for source, target, *op in rules:
        if target is None:
            continue
        targets = (target,) if isinstance(target, str) else target
        second = op == [twin]
        for name in list(whole if second else left):
            if (m := _pattern(targets[0]).match(name)) is None:
                continue
            *numbers, kind = m.groups()
            names = [_fill(t, numbers, kind) for t in targets]
            if second or all(n in left for n in names):
                for n in names:
                    left.pop(n, None)
                rows = op[0](config) if op and not second else None
                group = [whole[n] for n in names]
                if source.count("*") == len(numbers):
                    found.append(_joined(_fill(source, numbers, kind), group, rows))
                    continue
                for i, each in enumerate(zip(*map(_unstacked, group), strict=True)):
                    found.append(_joined(_fill(source, [*numbers, str(i)], kind), each, rows))
    if left:
        raise CheckpointError(f"this format has no place for {', '.join(left)}")
    return found


def _joined(name: str, group: Sequence[Entry], rows: Sequence[Taken] | None) -> Entry:
    """One tensor of the rows that each entry is."""
    if rows is None:
        return group[0]._replace(name=name)
    pieces = [piece for entry, taken in zip(group, rows, strict=True) for piece in _pieces(entry, taken)]
    (first, taken), dtype = pieces[0], group[0].dtype
    dim, shape = taken.dim, first.shape[::-1] if taken.turned else first.shape
    there = [_indices(taken.index) >= 0 for _, taken in pieces]
    shape = (*shape[:dim], sum(int(rows.sum()) for rows in there), *shape[dim + 1 :])

    def make() -> Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for (entry, taken), kept in zip(pieces, there, strict=True):
            index, made = taken.index, entry.make().cpu()
            made = made.mT if taken.turned else made
            if not kept.all():
                index, made = _indices(index)[kept], made.index_select(dim, kept.nonzero().flatten())
            whole[(*(slice(None),) * dim, index)] = made
        return whole

    return Entry(name, shape, dtype, make)


def _pieces(entry: Entry, taken: Taken) -> list[tuple[Entry, Rows]]:
    if isinstance(taken, list):
        return [piece for each, rows in zip(_unstacked(entry), taken, strict=True) for piece in _pieces(each, rows)]
    return [(entry, taken if isinstance(taken, Rows) else Rows(taken))]


def _unstacked(entry: Entry) -> list[Entry]:
    """What lies along the first dimension. The whole is made once, and let go when its last is asked for."""
    made: list[Tensor] = []

    def make(number: int) -> Tensor:
        if not made:
            made.append(entry.make())
        return made.pop()[number] if number + 1 == entry.shape[0] else made[0][number]

    return [entry._replace(shape=entry.shape[1:], make=partial(make, number)) for number in range(entry.shape[0])]


def _find(rules: Sequence[Rule], key: str) -> tuple[list[str], int | None, Op | None] | None:
    for source, target, *op in rules:
        if (m := _pattern(source).match(key)) is not None:
            *numbers, kind = m.groups()
            targets = [] if target is None else [target] if isinstance(target, str) else target
            stacked = any(len(numbers) > t.count("*") for t in targets)
            number = int(numbers.pop()) if stacked else None
            return [_fill(t, numbers, kind) for t in targets], number, op[0] if op else None
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
