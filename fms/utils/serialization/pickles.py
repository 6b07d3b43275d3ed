"""Reads torch.save's files (.pth, .bin, .pt) and Meta's shards of them, never running what a pickle may carry."""

import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.stored import Box, FileReader, Shape, Source, Stored, checked_size, listed, slices

WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")

# what torch's unpickler was seen to raise on damaged or hostile files
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    OSError,
    struct.error,
    MemoryError,
)


@dataclass(frozen=True)
class Resident:
    """A tensor of a file that can only be loaded as a whole."""

    file: Path
    tensor: Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return _room(self.tensor)

    def read_into(self, out: Tensor, box: Box) -> None:
        out.copy_(self.tensor[slices(box)])


@dataclass(frozen=True)
class Merged:
    """The shards of one tensor, side by side along `dim`; None: every shard has all of it."""

    parts: list[Source]
    dim: int | None

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def shape(self) -> Shape:
        shape = list(self.parts[0].shape)
        if self.dim is not None:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def read_into(self, out: Tensor, box: Box) -> None:
        if self.dim is None:
            self._read_repeated(out, box)
            return
        (start, stop), begin = box[self.dim], 0
        for part in self.parts:
            end = begin + part.shape[self.dim]
            low, high = max(start, begin), min(stop, end)
            if low < high:
                inside = [*box[: self.dim], (low - begin, high - begin), *box[self.dim + 1 :]]
                part.read_into(out.narrow(self.dim, low - start, high - low), inside)
            begin = end

    def _read_repeated(self, out: Tensor, box: Box) -> None:
        self.parts[0].read_into(out, box)
        for part in self.parts[1:]:
            other = torch.empty_like(out)
            part.read_into(other, box)
            if not torch.equal(out, other):
                raise CheckpointError(f"{part.file}: what every shard repeats differs from that in {self.file.name}")


class PickleReader(FileReader):
    """Tensors of torch.save's files, read from their place in the zip; a dict around the state dict is opened.

    Files in the older form, without a zip, are loaded as a whole.
    """

    def _parse(self, file: Path) -> Mapping[str, Source]:
        size = checked_size(file)
        with file.open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
        if not zipped:
            return {key: Resident(file, tensor) for key, tensor in _state_dict(file, _unpickled(file, "cpu")).items()}
        records = _zip_records(file, size)
        state = _state_dict(file, _unpickled(file, "meta"))  # no storage is read: each knows its offset in the file
        return {key: _placed(file, key, tensor, records) for key, tensor in state.items()}


def _zip_records(file: Path, size: int) -> dict[int, int]:
    """Offset -> size of each record of a torch zip; none may be packed or claim more than the file has."""
    records, order = {}, sys.byteorder.encode()
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            infos = archive.infolist()
            for info in infos:
                stream.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", stream.read(4))
                offset = info.header_offset + 30 + name + extra
                records[offset] = info.file_size
                if info.filename.endswith("/byteorder"):
                    stream.seek(offset)
                    order = stream.read(min(info.file_size, 10))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{file}: the zip's directory, at the end of the {size} bytes, is missing or broken ({error}): truncated? "
            "Fetch the file again"
        ) from None
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(
                f"{file}: {info.filename!r} is compressed, {info.compress_size} bytes for {info.file_size}: refused; "
                "torch.save stores tensors as they are"
            )
        if ".." in info.filename.split("/") or info.filename.startswith("/") or "\\" in info.filename:
            raise CheckpointError(f"{file}: the zip has an entry named {info.filename!r}: refused")
    if order != sys.byteorder.encode():
        raise CheckpointError(f"{file}: its bytes are in the order {order!r}, this machine's is {sys.byteorder!r}")
    if (total := sum(info.file_size for info in infos)) > size:
        raise CheckpointError(f"{file}: its zip claims {total} bytes of content, the file has {size}: refused")
    return records


def _unpickled(file: Path, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it can't read is an error of its own
            return torch.load(file, map_location=device, weights_only=True)
    except UNREADABLE as error:
        size = file.stat().st_size
        if asked := re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error)):
            raise CheckpointError(
                f"{file}: its pickle asks for {asked[1]}, which is code (or its {size} bytes are damaged): "
                "refused, none of it was run. Ask for the weights as safetensors or as a plain state dict"
            ) from None
        raise CheckpointError(
            f"{file}: {size} bytes that are no state dict of tensors by torch.save ({type(error).__name__}): "
            "truncated, damaged, or another format"
        ) from None


def _state_dict(file: Path, loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: holds a {type(loaded).__name__}, needs a dict of tensors")
    for state in (loaded, *(loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict))):
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        for key, tensor in tensors.items():
            if not isinstance(key, str) or tensor.layout != torch.strided or tensor.is_quantized:
                raise CheckpointError(f"{file}: {key!r} must be a name and its tensor dense, got {tensor.layout}")
        if tensors:
            return tensors
    raise CheckpointError(
        f"{file}: no tensors at the top, nor under any of {', '.join(WRAPPERS)}; it has {listed(map(str, loaded))}"
    )


def _room(tensor: Tensor) -> int:
    """Bytes of the storage from the tensor's first element on."""
    return tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * tensor.dtype.itemsize


def _placed(file: Path, key: str, tensor: Tensor, records: dict[int, int]) -> Stored:
    storage = tensor.untyped_storage()
    offset: int = storage._checkpoint_offset  # type: ignore[assignment]
    if (real := records.get(offset)) != storage.nbytes():
        raise CheckpointError(
            f"{file}: {key!r} claims {storage.nbytes()} bytes at {offset}, where the zip has a record of {real}"
        )
    first = offset + int(tensor.storage_offset()) * tensor.dtype.itemsize
    stride = None if tensor.is_contiguous() else tensor.stride()
    return Stored(file, first, _room(tensor), tuple(tensor.shape), tensor.dtype, stride)


SPLIT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
REPEATED = {"attention_norm", "ffn_norm", "norm"}


class MetaReader(FileReader):
    """Meta's `consolidated.NN.pth`, one a rank, as whole tensors; `dim` as in params.json. `rope.freqs` is left out."""

    def __init__(self, files: Iterable[Path], dim: int):
        self.dim = dim
        files = sorted(map(Path, files))
        names = [file.name for file in files]
        expected = [f"consolidated.{i:02}.pth" for i in range(len(files))]
        if len(files) > 1 and names != expected:
            raise CheckpointError(f"{files[0].parent}: expected the shards {listed(expected)}, got {listed(names)}")
        super().__init__(files)

    def _gather(self, where: Mapping[str, str]) -> dict[str, Source]:
        shards = [PickleReader([file])._tensors for file in self.files]
        keys = [key for key in shards[0] if key != "rope.freqs"]
        for file, shard in zip(self.files, shards, strict=True):
            if odd := shard.keys() ^ shards[0].keys():
                raise CheckpointError(f"{file}: {listed(sorted(odd))} not in it and in {self.files[0].name} alike")
        return {key: self._merged(key, [shard[key] for shard in shards]) for key in keys}

    def _merged(self, key: str, parts: list[Source]) -> Merged:
        dim = self._split_dim(key, parts) if len(parts) > 1 else None
        cut = [[n for i, n in enumerate(part.shape) if i != dim] for part in parts]
        for part, rest in zip(parts, cut, strict=True):
            if rest != cut[0] or part.dtype != parts[0].dtype:
                raise CheckpointError(
                    f"{part.file}: {key!r} is {part.shape} of {part.dtype}, which does not go with {parts[0].shape} of "
                    f"{parts[0].dtype} in {parts[0].file.name}"
                )
        return Merged(parts, dim)

    def _split_dim(self, key: str, parts: list[Source]) -> int | None:
        layer, _, kind = key.rpartition(".")
        name, shape = layer.rpartition(".")[2], parts[0].shape
        if kind == "weight" and name in REPEATED:
            return None
        if kind == "weight" and name in SPLIT and len(shape) == 2:
            return SPLIT[name]
        if key == "tok_embeddings.weight" and len(shape) == 2 and self.dim in (shape[1], shape[1] * len(parts)):
            return 0 if shape[1] == self.dim else 1
        raise CheckpointError(
            f"{parts[0].file}: no rule merges {len(parts)} shards of {key!r}, {shape} each, with the dim {self.dim}"
        )
