"""Opens a checkpoint, file or directory, whichever its format, and reads safetensors."""

import os
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fms.utils.serialization.errors import CheckpointError, nearest
from fms.utils.serialization.pickles import MetaReader, PickleReader
from fms.utils.serialization.stored import FileReader, Index, Shape, Source, Stored, checked_size, listed, parsed

LONGEST_HEADER = 100_000_000  # the safetensors format's own limit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PATTERNS = (
    "model.safetensors",
    "*.safetensors",
    "pytorch_model.bin",
    "*.bin",
    "consolidated.*.pth",
    "*.pth",
    "*.pt",
    "*.gguf",
)
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*\.(bin|pt|pth)")


class Reader(Protocol):
    """One checkpoint's tensors under the names of its own format; nothing is read until asked.

    `read` gives fresh memory. Its index has one plain slice (step 1) a dimension, missing ones meaning the whole; of
    dim 0 only the rows asked for are read. Several threads may read at once.
    """

    files: list[Path]

    def keys(self) -> Iterable[str]: ...
    def shape(self, key: str) -> Shape: ...
    def dtype(self, key: str) -> torch.dtype: ...
    def read(self, key: str, index: Index = ()) -> Tensor: ...


class SafetensorsReader(FileReader):
    """Tensors of safetensors files; `metadata` is theirs merged."""

    def __init__(self, files: Iterable[Path], where: Mapping[str, str] | None = None):
        self.metadata: dict[str, str] = {}
        super().__init__(files, where)

    def _parse(self, file: Path) -> Mapping[str, Source]:
        size = checked_size(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise CheckpointError(
                    f"{file}: not a safetensors file, or truncated: expected a header of {length} bytes after the "
                    f"first 8, the file has {size} bytes"
                )
            raw = stream.read(length)
        header = parsed(file, raw, "the header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{file}: __metadata__ must map names to strings, got {metadata!r:.80}")
        self.metadata.update(metadata)
        found = {key: _entry(file, key, entry, 8 + length) for key, entry in header.items()}
        end = 8 + length
        for key, stored in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if stored.offset != end:
                raise CheckpointError(f"{file}: {key!r} begins at byte {stored.offset}, expected {end}: overlap or gap")
            end += stored.nbytes
        if end != size:
            raise CheckpointError(
                f"{file}: expected {end} bytes by its header, the file has {size}: truncated or damaged"
            )
        return found


def _entry(file: Path, key: str, entry: Any, data: int) -> Stored:
    match entry:
        case {"dtype": str(name), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise CheckpointError(f"{file}: {key!r} needs dtype, shape and data_offsets, got {entry!r:.80}")
    if name not in DTYPES:
        raise CheckpointError(f"{file}: {key!r} is of dtype {name}, which can't be read; known are {', '.join(DTYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(f"{file}: {key!r} has the impossible shape {shape!r:.80}")
    expected = prod(shape) * DTYPES[name].itemsize
    if begin < 0 or end - begin != expected:
        raise CheckpointError(
            f"{file}: {key!r}, {shape} of {name}, takes {expected} bytes; its offsets {begin}..{end} give {end - begin}"
        )
    return Stored(file, data + begin, expected, tuple(shape), DTYPES[name])


def open_reader(path: str | Path) -> Reader:
    """The reader of a checkpoint file, or of a directory: by its index file, else by the first of `PATTERNS` it has."""
    path = Path(path).expanduser()
    if path.is_file():
        return _by_name([path])
    if not path.is_dir():
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"{path}: no such file or directory{nearest(path.name, there)}")
    for name in INDEXES:
        if (path / name).exists():
            return _indexed(path / name)
    for pattern in PATTERNS:
        files = sorted(file for file in path.glob(pattern) if file.is_file() and not NOT_WEIGHTS.fullmatch(file.name))
        if len(files) > 1:
            files = [file for file in files if file.name != "consolidated.safetensors"]
        if files:
            return _by_name(files)
    there = sorted(entry.name for entry in path.iterdir())
    raise CheckpointError(
        f"{path}: no weights: looked for {', '.join(INDEXES + PATTERNS)}; there is {listed(there) or 'nothing'}"
    )


def _by_name(files: list[Path], where: Mapping[str, str] | None = None) -> Reader:
    file, directory = files[0], files[0].parent
    if file.suffix == ".gguf":
        from fms.utils.serialization.gguf import GGUFReader

        if len({re.sub(r"-\d+-of-", "-of-", file.name) for file in files}) > 1:
            raise CheckpointError(f"{directory}: several models: name one of {listed(file.name for file in files)}")
        return GGUFReader(file)
    if file.suffix == ".safetensors":
        return SafetensorsReader(_complete(files), where)
    if file.suffix not in (".bin", ".pth", ".pt"):
        raise CheckpointError(f"{file}: not a kind of checkpoint known by its name: .safetensors .bin .pth .pt .gguf")
    params = directory / "params.json"
    if file.match("consolidated.*.pth") and (len(files) > 1 or params.exists()):  # Mistral's .pt are not cut
        checked_size(params)
        dim = parsed(params, params.read_bytes(), "its content").get("dim")
        if not isinstance(dim, int):
            raise CheckpointError(f"{params}: needs a whole number as dim to merge {len(files)} shards, got {dim!r}")
        return MetaReader(files, dim)
    return PickleReader(_complete(files), where)


def _complete(files: list[Path]) -> list[Path]:
    """The files, none missing of those whose names count them (`model-00001-of-00003`)."""
    missing = set()
    for file in files:
        if counted := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\..*)", file.name):
            head, digits, of, total, tail = counted.groups()
            missing |= {f"{head}{i:0{len(digits)}}{of}{total}{tail}" for i in range(1, min(int(total), 10_000) + 1)}
    if missing := missing - {file.name for file in files}:
        raise CheckpointError(f"{files[0].parent}: shards are missing: {listed(sorted(missing))}")
    return files


def _indexed(index: Path) -> Reader:
    """The shards that an index file names, after a look at the index, at each shard and at where each key lies."""
    checked_size(index)
    where = parsed(index, index.read_bytes(), "the index").get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index}: needs a weight_map from keys to file names, got {where!r:.80}")
    suffix = index.name.split(".")[1]
    names = sorted(set(where.values()))
    refused = {name for name in names if not _inside(index.parent, name, f".{suffix}")}
    problems = [f"{index}: {name!r} is not a plain *.{suffix} name inside the directory: refused" for name in refused]
    files = [index.parent / name for name in names if name not in refused]
    try:
        if files:
            reader = _by_name(files, where)
    except CheckpointError as error:
        problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return reader


def _inside(directory: Path, name: str, suffix: str) -> bool:
    """Whether a name is that of a file of the directory itself, or a link of the Hub's cache to its own blobs."""
    if name != Path(name).name or "\\" in name or not name.isprintable() or not name.endswith(suffix):
        return False
    home, real = Path(os.path.realpath(directory)), Path(os.path.realpath(directory / name))
    return real.parent == home or (home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs")
