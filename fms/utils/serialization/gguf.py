"""GGUF files: llama.cpp's one-file checkpoints, read in slices and dequantised on the way.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks: ggml-quants.c of the same repository.
"""

import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from fms.utils.serialization.errors import CheckpointError, nearest

Array = np.ndarray[Any, Any]
_VALUE_CODES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # GGUF's value types as struct's letters
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 1 << 24  # of an array; the largest vocabularies have some 10^6 merges
_MAX_HEADER = 1 << 27  # bytes; the largest vocabularies take some 2 * 10^7
_CHUNK = 1 << 18  # values dequantised at a time: what is in flight stays in a core's cache
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


# Numpy, not torch: its operations run in the calling thread and let others run. Torch's wake a team of threads each,
# and where the cores are busy those teams wait for each other: seconds instead of milliseconds.
def _half(blocks: Array, at: int) -> Array:
    """The fp16 number at byte `at` of every block, as float32 (n, 1)."""
    return blocks[:, at : at + 2].view(np.float16).astype(np.float32)


def _nibbles(packed: Array, group: int) -> Array:
    """(n, bytes) -> (n, 2 * bytes): of every `group` bytes first the low halves, then the high ones."""
    packed = packed.reshape(len(packed), -1, group)
    values = np.empty((*packed.shape[:2], 2, group), np.uint8)
    np.bitwise_and(packed, 15, out=values[:, :, 0])
    np.right_shift(packed, 4, out=values[:, :, 1])
    return values.reshape(len(packed), -1)


def _fields(packed: Array, width: int, group: int) -> Array:
    """(n, bytes) -> (n, bytes * 8 / width) fields of `width` bits: of every `group` bytes first the lowest fields."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return (packed.reshape(len(packed), -1, 1, group) >> shifts & (1 << width) - 1).reshape(len(packed), -1)


def _scales_and_mins(blocks: Array) -> tuple[Array, Array]:
    """Eight scales and eight minima, 6 bits each, in 12 bytes after two fp16 factors: both float32 (n, 8, 1)."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], 1)
    mins = np.concatenate([mid & 63, high >> 4 | mid >> 2 & 48], 1)
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * mins)[..., None]


# Each takes n blocks (n, bytes) and fills out (n, values); the order of operations is ggml's, so the bits are too.
def _plain(blocks: Array, out: Array) -> None:
    out[:] = blocks.view(out.dtype)


def _q8_0(blocks: Array, out: Array) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _q4_0(blocks: Array, out: Array) -> None:
    out[:] = _nibbles(blocks[:, 2:], 16)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: Array, out: Array) -> None:
    out[:] = _nibbles(blocks[:, 4:], 16)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: Array, out: Array) -> None:
    out[:] = _nibbles(blocks[:, 6:], 16) | _fields(blocks[:, 2:6], 1, 1) << 4
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: Array, out: Array) -> None:
    out[:] = _nibbles(blocks[:, 8:], 16) | _fields(blocks[:, 4:8], 1, 1) << 4
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q4_k(blocks: Array, out: Array) -> None:
    scales, mins = _scales_and_mins(blocks)
    groups = out.reshape(-1, 8, 32)  # a view
    groups[:] = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32)
    groups *= scales
    groups -= mins


def _q5_k(blocks: Array, out: Array) -> None:
    scales, mins = _scales_and_mins(blocks)
    groups = out.reshape(-1, 8, 32)  # a view
    groups[:] = (_nibbles(blocks[:, 48:], 32) | _fields(blocks[:, 16:48], 1, 32) << 4).reshape(-1, 8, 32)
    groups *= scales
    groups -= mins


def _q6_k(blocks: Array, out: Array) -> None:
    groups = out.reshape(-1, 16, 16)  # a view
    groups[:] = (_nibbles(blocks[:, :128], 64) | _fields(blocks[:, 128:192], 2, 32) << 4).reshape(-1, 16, 16)
    groups -= 32
    groups *= (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[..., None]


class _Type(NamedTuple):
    name: str
    values: int  # in a block
    bytes: int  # of a block
    dtype: torch.dtype
    dequantise: Callable[[Array, Array], None]


_TYPES = {
    0: _Type("F32", 1, 4, torch.float32, _plain),
    1: _Type("F16", 1, 2, torch.float16, _plain),
    30: _Type("BF16", 1, 2, torch.bfloat16, _plain),
    2: _Type("Q4_0", 32, 18, torch.float32, _q4_0),
    3: _Type("Q4_1", 32, 20, torch.float32, _q4_1),
    6: _Type("Q5_0", 32, 22, torch.float32, _q5_0),
    7: _Type("Q5_1", 32, 24, torch.float32, _q5_1),
    8: _Type("Q8_0", 32, 34, torch.float32, _q8_0),
    12: _Type("Q4_K", 256, 144, torch.float32, _q4_k),
    13: _Type("Q5_K", 256, 176, torch.float32, _q5_k),
    14: _Type("Q6_K", 256, 210, torch.float32, _q6_k),
}
_OTHER_TYPES = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
_OTHER_TYPES |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_OTHER_TYPES |= {28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}


class _Tensor(NamedTuple):
    path: Path
    start: int  # of its bytes in the file
    end: int
    shape: tuple[int, ...]
    type: _Type


class _File:
    """One file's header, parsed. No count or length is believed before the file is known to be long enough for it."""

    def __init__(self, path: Path) -> None:
        self.path, self.at, self.buffer = path, 0, bytearray()
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, _Tensor] = {}
        with _opened(path) as self.file:
            self.size = os.fstat(self.file.fileno()).st_size
            self.parse()
        del self.buffer

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {what}")

    def need(self, count: int, what: str) -> None:
        """Have the next `count` bytes in the buffer."""
        end = self.at + count
        if end > self.size:
            self.fail(f"truncated or damaged: {what} must reach to byte {end}, the file has {self.size}")
        if end > _MAX_HEADER:
            self.fail(f"damaged: {what} must reach to byte {end}, a header may have {_MAX_HEADER}")
        while len(self.buffer) < end:
            more = self.file.read(max(1 << 20, end - len(self.buffer)))
            if not more:
                self.fail(f"cut short while it was read: expected {self.size} bytes, found {len(self.buffer)}")
            self.buffer += more

    def check_count(self, count: int, size: int, what: str) -> None:
        """Refuse more items than are plausible or, at `size` bytes each or more, fit in the file."""
        if count > _MAX_ITEMS:
            self.fail(f"damaged: claims {count} {what}, at most {_MAX_ITEMS} are believed")
        self.need(count * size, f"{count} {what}")

    def numbers(self, code: str, what: str, count: int = 1) -> tuple[Any, ...]:
        form = struct.Struct(f"<{count}{code}")
        self.need(form.size, what)
        self.at += form.size
        return form.unpack_from(self.buffer, self.at - form.size)

    def strings(self, what: str, count: int = 1) -> tuple[str, ...]:
        found, length_at, buffer = [], struct.Struct("<Q").unpack_from, self.buffer
        for _ in range(count):
            start = self.at + 8
            if start > len(buffer):
                self.need(8, what)
            end = start + length_at(buffer, self.at)[0]
            if end > len(buffer):
                self.need(end - self.at, what)
            try:
                found.append(buffer[start:end].decode())
            except UnicodeDecodeError:
                self.fail(f"damaged: {what}: the text at byte {start} is not UTF-8: {bytes(buffer[start:end][:40])!r}")
            self.at = end
        return tuple(found)

    def parse(self) -> None:
        self.need(4, "the magic number")
        if (magic := bytes(self.buffer[:4])) != b"GGUF":
            self.fail(f"not a GGUF file: it must begin with b'GGUF', found {magic!r}")
        self.at = 4
        (version,) = self.numbers("I", "the version")
        if version & 0xFFFF == 0:
            self.fail("a big-endian GGUF file; little-endian is required")
        if version not in (2, 3):
            self.fail(f"GGUF version {version}; 2 or 3 is required")
        tensors, entries = self.numbers("Q", "the counts of tensors and metadata", 2)
        self.check_count(entries, 12, "metadata entries")  # each has a key's length and a type, at least
        for _ in range(entries):
            self.parse_entry()
        self.check_count(tensors, 24, "tensors")  # each has a name's length, a rank, a type, an offset, at least
        infos = [self.parse_info() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"damaged: general.alignment is {alignment!r}, a power of two is required")
        base = -(-self.at // alignment) * alignment
        for name, shape, kind, offset in infos:
            self.place(name, shape, kind, base, offset, alignment)
        for (a, first), (b, second) in pairwise(sorted(self.tensors.items(), key=lambda item: item[1].start)):
            if first.end > second.start:
                self.fail(f"damaged: tensor {a!r} ends at byte {first.end}, {b!r} begins at {second.start}")

    def parse_entry(self) -> None:
        (key,) = self.strings("a metadata key")
        what = f"metadata {key!r}"
        if key in self.metadata:
            self.fail(f"{what} is there twice")
        (kind,), count = self.numbers("I", what), 1
        is_array = kind == _ARRAY
        if is_array:
            (kind,), (count,) = self.numbers("I", what), self.numbers("Q", what)
        if kind != _STRING and kind not in _VALUE_CODES:
            self.fail(f"damaged: {what} has value type {kind}; 0 to 12 are known, and no arrays within arrays")
        code = _VALUE_CODES.get(kind, "Q")  # a string has a length, at least
        self.check_count(count, struct.calcsize(f"<{code}"), f"items of {what}")
        values = self.strings(what, count) if kind == _STRING else self.numbers(code, what, count)
        self.metadata[key] = list(values) if is_array else values[0]

    def parse_info(self) -> tuple[str, tuple[int, ...], _Type, int]:
        (name,) = self.strings("a tensor's name")
        what = f"tensor {name!r}"
        (rank,) = self.numbers("I", what)
        if rank > 4:
            self.fail(f"damaged: {what} has {rank} dimensions, at most 4 are possible")
        shape = self.numbers("Q", what, rank)[::-1]  # the file has the fastest dimension first
        (kind,), (offset,) = self.numbers("I", what), self.numbers("Q", what)
        if kind not in _TYPES:
            supported = ", ".join(known.name for known in _TYPES.values())
            self.fail(f"{what} is of type {_OTHER_TYPES.get(kind, 'number')} ({kind}); supported are {supported}")
        return name, shape, _TYPES[kind], offset

    def place(self, name: str, shape: tuple[int, ...], kind: _Type, base: int, offset: int, alignment: int) -> None:
        """Find the tensor's bytes in the file."""
        what = f"tensor {name!r} of shape {list(shape)} and type {kind.name}"
        if name in self.tensors:
            self.fail(f"tensor {name!r} is there twice")
        if min(shape, default=1) < 1 or (shape or (1,))[-1] % kind.values:
            self.fail(f"damaged: {what}: sizes must be positive and the last a multiple of {kind.values}")
        if offset % alignment:
            self.fail(f"damaged: {what} begins at {offset}, required is a multiple of {alignment}")
        start, end = base + offset, base + offset + prod(shape) // kind.values * kind.bytes
        if end > self.size:
            self.fail(f"truncated or damaged: {what} takes bytes {start} to {end}, the file has {self.size}")
        self.tensors[name] = _Tensor(self.path, start, end, shape, kind)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _fill(target: Array, file: FileIO, at: int) -> None:
    """Read a contiguous array's bytes from byte `at` of the file."""
    left = target.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(file.fileno(), [left], at)
        if not count:
            raise CheckpointError(
                f"{file.name}: cut short since it was opened: expected {len(left)} bytes at byte {at}"
            )
        left, at = left[count:], at + count


def _bounds(key: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """The first place and one past the last, in each dimension."""
    if len(index) > len(shape) or any(part.step not in (None, 1) for part in index):
        raise ValueError(f"index {index} into {key!r} of shape {list(shape)}: at most one slice of step 1 a dimension")
    index += (slice(None),) * (len(shape) - len(index))
    ranges = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    return [(start, max(start, stop)) for start, stop, _ in ranges]


def _split_parts(opened: _File) -> list[_File]:
    """The file itself or, where it belongs to a split model, all parts in order."""
    path, count = opened.path, opened.metadata.get("split.count", 1)
    if count in (0, 1):
        return [opened]
    if type(count) is not int:
        opened.fail(f"damaged: split.count is {count!r}, a whole number is required")
    name = _SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        opened.fail(f"one of {count} parts (split.count), so its name must end in -NNNNN-of-{count:0>5}.gguf")
    paths = [path.with_name(f"{name[1]}-{number:05}-of-{name[3]}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        opened.fail(f"{len(missing)} of {count} parts are missing: {', '.join(missing)}")
    parts = [_File(part) for part in paths]
    for number, part in enumerate(parts):
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (number, count):
            part.fail(f"split.no and split.count must be {(number, count)}, found {found}")
    return parts


class GGUFReader:
    """The tensors of a GGUF file, or of all parts of a split one; quantised ones come as float32."""

    def __init__(self, path: str | Path) -> None:
        parts = _split_parts(_File(Path(path)))
        self.files = [part.path for part in parts]
        self.metadata: dict[str, Any] = parts[0].metadata
        self._tensors: dict[str, _Tensor] = {}
        for part in parts:
            if twice := sorted(part.tensors.keys() & self._tensors.keys()):
                part.fail(f"has tensors that an earlier part has: {', '.join(twice)}")
            self._tensors |= part.tensors
        total = self.metadata.get("split.tensors.count", len(self._tensors))
        if total != len(self._tensors):
            parts[0].fail(f"split.tensors.count is {total}, the parts have {len(self._tensors)} tensors")

    def _tensor(self, key: str) -> _Tensor:
        if key not in self._tensors:
            raise CheckpointError(f"{self.files[0]}: no tensor {key!r}{nearest(key, self._tensors)}")
        return self._tensors[key]

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensor(key).shape

    def dtype(self, key: str) -> torch.dtype:
        return self._tensor(key).type.dtype

    def tensor_type(self, key: str) -> str:
        """ggml's name of the type in the file, such as "Q4_1"."""
        return self._tensor(key).type.name

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        """The part of a tensor that `index` selects, one slice of step 1 a dimension; only its rows are read."""
        path, offset, _, shape, kind = self._tensor(key)
        bounds = _bounds(key, shape, index)
        out = torch.empty([stop - start for start, stop in bounds], dtype=kind.dtype, device="cpu")
        if out.numel() == 0:
            return out
        _, planes, rows, columns = (1,) * (4 - len(shape)) + shape
        outer, inner, (top, bottom), (left, right) = [(0, 1)] * (4 - len(shape)) + bounds
        row_blocks, first, last = columns // kind.values, left // kind.values, -(-right // kind.values)
        cut = slice(left - first * kind.values, right - first * kind.values)  # of the values in blocks first to last
        step = max(1, _CHUNK // columns)
        flat = out.view(-1, right - left)
        todo = (flat.view(torch.int16) if kind.dtype == torch.bfloat16 else flat).numpy()  # numpy has no bfloat16
        with _opened(path) as file, np.errstate(invalid="ignore"):  # infinite factors are for the caller to find
            for plane in (i * planes + j for i in range(*outer) for j in range(*inner)):
                for row in range(top, bottom, step):
                    count = min(step, bottom - row)
                    part, todo = todo[:count], todo[count:]
                    at = offset + (plane * rows + row) * row_blocks * kind.bytes
                    if kind.values == 1 and right - left == columns:
                        _fill(part, file, at)
                        continue
                    blocks: Array = np.empty((count, row_blocks, kind.bytes), np.uint8)
                    _fill(blocks, file, at)
                    blocks = blocks[:, first:last].reshape(-1, kind.bytes)
                    if right - left == (last - first) * kind.values:
                        kind.dequantise(blocks, part.reshape(-1, kind.values))
                    else:
                        values = np.empty((count, (last - first) * kind.values), part.dtype)
                        kind.dequantise(blocks, values.reshape(-1, kind.values))
                        part[:] = values[:, cut]
        return out
