"""Where a tensor lies in a file, how a part of it is read by position, and what readers of files share."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fms.utils.serialization.errors import CheckpointError, nearest

Shape = tuple[int, ...]
Index = tuple[slice, ...]
Box = list[tuple[int, int]]  # start and stop in every dimension

CHUNK = 4 << 20  # bytes read at a time where rows have to be cut


class Source(Protocol):
    """Where one tensor comes from. `nbytes` is what its file really has for it."""

    @property
    def file(self) -> Path: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def read_into(self, out: Tensor, box: Box) -> None: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, its first element at byte `offset`; `stride` is in elements, None if row-major."""

    file: Path
    offset: int
    nbytes: int
    shape: Shape
    dtype: torch.dtype
    stride: Shape | None = None

    def read_into(self, out: Tensor, box: Box) -> None:
        with self.file.open("rb", buffering=0) as file:
            if self.stride is None or not out.numel():
                self._fill(file.fileno(), out, self.offset, self.shape, box)
                return
            span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
            flat = torch.empty(span, dtype=self.dtype, device="cpu")
            self._pread(file.fileno(), flat, self.offset)
            out.copy_(flat.as_strided(self.shape, self.stride)[slices(box)])

    def _fill(self, fd: int, out: Tensor, offset: int, shape: Shape, box: Box) -> None:
        """Reads a box of a row-major array that begins at `offset`: at once if one range of bytes, else by chunks."""
        if not out.numel():
            return
        row = prod(shape[1:]) * self.dtype.itemsize
        start, stop = box[0] if box else (0, 1)
        if out.is_contiguous() and all(range_ == (0, n) for range_, n in zip(box[1:], shape[1:], strict=True)):
            self._pread(fd, out, offset + start * row)
        elif row > CHUNK:
            for i in range(start, stop):
                self._fill(fd, out[i - start], offset + i * row, shape[1:], box[1:])
        else:
            rows = torch.empty((min(CHUNK // row, stop - start), *shape[1:]), dtype=self.dtype, device="cpu")
            for i in range(start, stop, len(rows)):
                part = rows[: stop - i]
                self._pread(fd, part, offset + i * row)
                out[i - start : i - start + len(part)] = part[(slice(None), *slices(box[1:]))]

    def _pread(self, fd: int, out: Tensor, offset: int) -> None:
        view = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while view:
            count = os.preadv(fd, [view], offset)
            if not count:
                raise CheckpointError(f"{self.file}: {len(view)} bytes missing at {offset}: cut since it was opened?")
            view, offset = view[count:], offset + count


class FileReader:
    """Readers of whole files: what they share once each file's header has been parsed.

    `where` (key -> file name, of an index file) is checked against what the files hold; every problem of every file is
    gathered into one error.
    """

    def __init__(self, files: Iterable[Path], where: Mapping[str, str] | None = None):
        self.files = [Path(file) for file in files]
        self._tensors = self._gather(where or {})

    def _gather(self, where: Mapping[str, str]) -> dict[str, Source]:
        tensors: dict[str, Source] = {}
        problems = []
        for file in self.files:
            try:
                found = self._parse(file)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if doubled := [key for key in found if key in tensors]:
                problems.append(f"{file}: {listed(doubled)} also in {tensors[doubled[0]].file.name}")
            if lacking := [key for key, name in where.items() if name == file.name and key not in found]:
                problems.append(f"{file}: lacks {listed(lacking)}, which the index places there")
            tensors.update(found)
        if problems:
            raise CheckpointError("\n".join(problems))
        return tensors

    def _parse(self, file: Path) -> Mapping[str, Source]:
        raise NotImplementedError

    def _source(self, key: str) -> Source:
        if key not in self._tensors:
            raise CheckpointError(f"{self.files[0]}: no tensor {key!r}{nearest(key, self._tensors)}")
        return self._tensors[key]

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> Shape:
        return self._source(key).shape

    def dtype(self, key: str) -> torch.dtype:
        return self._source(key).dtype

    def read(self, key: str, index: Index = ()) -> Tensor:
        source = self._source(key)
        claimed = prod(source.shape) * source.dtype.itemsize
        if claimed > source.nbytes:
            raise CheckpointError(
                f"{source.file}: {key!r} claims the shape {source.shape}, {claimed} bytes, but the file has only "
                f"{source.nbytes} for it"
            )
        box = box_of(key, source.shape, index)
        out = torch.empty([stop - start for start, stop in box], dtype=source.dtype, device="cpu")
        source.read_into(out, box)
        return out


def box_of(key: str, shape: Shape, index: Index) -> Box:
    """The index as start and stop of every dimension."""
    if len(index) > len(shape) or any(cut.step not in (None, 1) for cut in index):
        raise ValueError(f"{key!r} of shape {shape} takes at most {len(shape)} slices of step 1, got {index}")
    box = [cut.indices(n)[:2] for cut, n in zip(index, shape, strict=False)]
    return [(start, max(start, stop)) for start, stop in box] + [(0, n) for n in shape[len(index) :]]


def slices(box: Box) -> Index:
    return tuple(slice(*range_) for range_ in box)


def listed(names: Iterable[str]) -> str:
    """Some names for a message: ten at most, then how many more."""
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def checked_size(file: Path) -> int:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    with file.open("rb") as stream:
        if stream.read(23) == b"version https://git-lfs":
            raise CheckpointError(f"{file}: a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    if not (size := file.stat().st_size):
        raise CheckpointError(f"{file}: empty (0 bytes)")
    return size


def parsed(file: Path, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object, each name once."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        found = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {what} is broken JSON ({error}): truncated or damaged") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: {what} must be a JSON object, got {found!r:.80}")
    return found
