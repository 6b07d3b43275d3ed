"""Writes checkpoints: safetensors tensor by tensor, .pth, the manifest, and directories that appear whole or not."""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.readers import DTYPES
from fms.utils.serialization.stored import CHUNK, checked_size, parsed

NAMES = {dtype: name for name, dtype in DTYPES.items()}
MANIFEST = "manifest.json"
WRITING, REPLACED = ".writing", ".replaced"  # what directories beside a target end with

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Entry(NamedTuple):
    """A tensor to be written: what it will be, known ahead, and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def made(self) -> Tensor:
        tensor = self.make().detach()
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"{self.name!r} was to be {self.shape} of {self.dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            )
        return tensor


def write_safetensors(
    directory: Path,
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> list[Path]:
    """Writes model.safetensors, or numbered shards and their index if one file would pass `max_shard_bytes`.

    The files written come back. One tensor at a time is in memory.
    """
    shards: list[list[Entry]] = [[]]
    where: dict[str, int] = {}
    room = max_shard_bytes
    for entry in entries:
        if entry.name in where or entry.name == "__metadata__" or entry.dtype not in NAMES:
            raise ValueError(
                f"{entry.name!r} of {entry.dtype}: safetensors needs each name once, none of them __metadata__, and "
                f"a dtype of {', '.join(NAMES.values())}"
            )
        if shards[-1] and entry.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        where[entry.name] = len(shards) - 1
        shards[-1].append(entry)
        room -= entry.nbytes
    count = len(shards)
    files = [directory / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        files = [directory / "model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        _write_shard(file, shard, {"format": "pt", **(metadata or {})})
    if count > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for shard in shards for entry in shard)},
            "weight_map": {name: files[i].name for name, i in where.items()},
        }
        files.append(directory / "model.safetensors.index.json")
        files[-1].write_text(json.dumps(index, indent=2) + "\n")
    return files


def _write_shard(file: Path, entries: list[Entry], metadata: dict[str, str]) -> None:
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # stable, and every tensor is aligned
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        offsets = [end, end := end + entry.nbytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _write_tensor(stream, entry.made())


def _write_tensor(stream: BinaryIO, tensor: Tensor) -> None:
    """By chunks of rows, so that a tensor on another device, or not contiguous, isn't copied as a whole."""
    if not tensor.numel():
        return
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    for part in tensor.split(max(1, CHUNK * len(tensor) // tensor.nbytes)):
        data = part.contiguous().cpu().view(-1).view(torch.uint8).numpy()
        stream.write(memoryview(data))  # type: ignore[arg-type]


def write_pickle(file: Path, entries: Iterable[Entry]) -> None:
    """Writes a plain state dict by torch.save, all of it in memory at once; views keep only what they show."""
    state = {}
    for entry in entries:
        tensor = entry.made().cpu()
        state[entry.name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    torch.save(state, file)


@contextmanager
def writing(directory: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside `directory` to write in, which takes its place, on disk, once the block has ended well.

    A failed block leaves nothing, a killed one a hidden directory that the next `writing` removes. Only a flat
    directory is ever overwritten.
    """
    target = Path(directory).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    _check_free(target, overwrite)
    with _locked_sibling(target) as aside:
        try:
            yield aside
            _sync(aside)
            _check_free(target, overwrite)
            _put(aside, target, overwrite)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; a new or empty directory is needed")
    there = sorted(target.iterdir())
    if there and not overwrite:
        raise ValueError(
            f"{target} exists and is not empty ({there[0].name}, ...): choose another, or allow overwriting"
        )
    if inner := [entry.name for entry in there if entry.is_dir()]:
        raise ValueError(
            f"{target} has directories in it ({inner[0]}, ...), which a checkpoint has not: remove it yourself"
        )


@contextmanager
def _locked_sibling(target: Path) -> Iterator[Path]:
    """A new hidden directory, locked: the lock ends with this process however it ends, and so tells a stale one."""
    while True:
        aside = target.parent / f".{target.name}.{secrets.token_hex(4)}{WRITING}"
        aside.mkdir()
        if (lock := _lock(aside)) is not None:
            break
    try:
        yield aside
    finally:
        os.close(lock)


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock; None if another process has it, or has just removed it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if not directory.exists():
        os.close(descriptor)
        return None
    return descriptor


def _clean(target: Path) -> None:
    """Removes what killed processes left beside the target; what one was about to replace is put back."""
    beside = [
        path
        for path in target.parent.iterdir()
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}", path.stem)
    ]
    for stale in (path for path in beside if path.suffix == WRITING):
        if (lock := _lock(stale)) is not None:
            old = stale.with_suffix(REPLACED)
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(stale)
            os.close(lock)
    for old in (path for path in beside if path.suffix == REPLACED):
        if not old.with_suffix(WRITING).exists():
            shutil.rmtree(old, ignore_errors=True)


def _put(aside: Path, target: Path, overwrite: bool) -> None:
    old = aside.with_suffix(REPLACED)
    if overwrite and target.exists():
        target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync_one(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync_one(path)
    _sync_one(directory)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(directory: Path, progress: Progress | None = None) -> Path:
    """Writes manifest.json: size and sha256 of each file of the directory, by name."""
    manifest = directory / MANIFEST
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != manifest)
    sizes = [file.stat().st_size for file in files]
    hashes = _hashes(files, sum(sizes), progress)
    content = {
        file.relative_to(directory).as_posix(): {"size": size, "sha256": sha256}
        for file, size, sha256 in zip(files, sizes, hashes, strict=True)
    }
    manifest.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return manifest


def verify_manifest(directory: Path, progress: Progress | None = None) -> list[str]:
    """What is not as manifest.json has it, a line a file. What it doesn't list is not looked at."""
    manifest = directory / MANIFEST
    try:
        checked_size(manifest)
        content = parsed(manifest, manifest.read_bytes(), "the manifest")
    except CheckpointError as error:
        return [str(error)]
    problems, right = [], {}
    for name, entry in sorted(content.items()):
        file = directory / name
        match entry:
            case {"size": int(size), "sha256": str(sha256)} if (
                not Path(name).is_absolute() and ".." not in Path(name).parts
            ):
                if not file.is_file():
                    problems.append(f"{file}: missing")
                elif (real := file.stat().st_size) != size:
                    problems.append(f"{file}: expected {size} bytes, the file has {real}")
                else:
                    right[file] = sha256
            case _:
                problems.append(f"{manifest}: {name!r} needs to be inside, with size and sha256, got {entry!r:.80}")
    hashes = _hashes(right, sum(file.stat().st_size for file in right), progress)
    for (file, expected), sha256 in zip(right.items(), hashes, strict=True):
        if sha256 != expected:
            problems.append(f"{file}: damaged: expected sha256 {expected}, its content gives {sha256}")
    return problems


def _hashes(files: Iterable[Path], total: int, progress: Progress | None) -> Iterator[str]:
    buffer = bytearray(CHUNK)
    done = 0
    for file in files:
        sha256 = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                sha256.update(memoryview(buffer)[:count])
                done += count
                if progress:
                    progress(done, total)
        yield sha256.hexdigest()
