"""From a checkpoint into a model that was described on the meta device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fms.modules.tp import resharded, shard_of, unpadded
from fms.utils.serialization.checkpoint import Checkpoint
from fms.utils.serialization.errors import CheckpointError, nearest
from fms.utils.serialization.readers import Reader
from fms.utils.serialization.stored import Index
from fms.utils.serialization.tables import Part

SHOWN = 20  # faults of those that do not fit
READERS = 2  # threads: one waits for the disk while another converts
PIECE = 128 << 20  # bytes of the host's memory for a tensor on its way to another device


def plan(model: nn.Module, checkpoint: Checkpoint, strict: bool = True) -> dict[str, Part]:
    """Where each parameter comes from. Reads no weights but a few rows of a tied pair that the file has twice.

    Raises one `CheckpointError` that names every key that no rule takes, every parameter that nothing fills and every
    wrong shape, and a tied pair that differs; with `strict=False` only for these two.
    """
    parts, unknown = checkpoint.parts(model.config)
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = {name: _shape(model, name) for name, _ in model.named_parameters()}  # of a tied pair the first
    reader = checkpoint.reader
    wrong = [
        f"{name}: {_described(part, reader)}, the model wants {list(shape)}"
        for name, shape in wanted.items()
        if (part := parts.get(name)) is not None and part.shape(reader) != tuple(shape)
    ]
    wrong += _badly_split(parts, reader)
    wrong += _torn(model, parts, reader)
    if strict:
        extra = [*unknown, *(part.key for name, part in parts.items() if name not in aliases)]
        missing = [name for name in wanted if name not in parts]
        wrong += [f"{key}: the model has no place for it" for key in extra]
        near = extra if max(len(extra), len(missing)) <= SHOWN else []  # the search takes long among many
        wrong += [f"{name}: nothing in the checkpoint fills it{nearest(name, near)}" for name in missing]
    if wrong:
        shown = wrong[:SHOWN] + ([f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])
        raise CheckpointError("\n  ".join([f"{checkpoint.path} does not fit the model:", *shown]))
    return {name: parts[name] for name in wanted if name in parts}


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    owner, _, leaf = name.rpartition(".")
    return unpadded(model.get_submodule(owner), leaf)


def _described(part: Part, reader: Reader) -> str:
    if part.rows is None:
        return f"{part.key} has shape {list(part.shape(reader))}"
    return f"{part.key}, of which it is a part, has shape {list(reader.shape(part.key))}"


def _torn(model: nn.Module, parts: Mapping[str, Part], reader: Reader) -> list[str]:
    """Tied parameters of which the checkpoint has two that begin with other rows: one of them would be lost."""
    first: dict[nn.Parameter, str] = {}
    wrong = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        one = first.setdefault(parameter, name)
        if one != name and one in parts and name in parts and parts[one].shape(reader) == parts[name].shape(reader):
            head = (slice(0, min(4, len(parameter))),)
            if not parts[one].read(reader, head).equal(parts[name].read(reader, head)):
                wrong.append(f"{name}: {parts[name].key} is not {parts[one].key}, the model ties them (tie_heads)")
    return wrong


def _badly_split(parts: Mapping[str, Part], reader: Reader) -> list[str]:
    """Source tensors that have too few rows for the parts taken of them, or are split and have rows left over."""
    taken: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for name, part in parts.items():
        for piece in part.pieces:
            if piece.rows is not None:
                taken.setdefault((piece.key, piece.dim), []).append((name, piece.end))
    wrong = []
    for (key, dim), pieces in taken.items():
        rows, end = (*reader.shape(key)[dim : dim + 1], 0)[0], max(end for _, end in pieces)
        if rows < end or (rows > end and len(pieces) > 1):
            names = ", ".join(dict.fromkeys(name for name, _ in pieces))
            wrong.append(f"{names}: {key} has {rows} rows, the model wants {end}")
    return wrong


def fill(
    model: nn.Module,
    parts: Mapping[str, Part],
    reader: Reader,
    dtype: torch.dtype,
    device: torch.device,
    finite: bool = False,
) -> None:
    """Give each parameter its tensor. Extra memory of the host is that of the few tensors, or pieces, in flight.

    `finite` raises `CheckpointError` naming the tensors that hold NaN or infinity.
    """

    def read(name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        get = parts[name].read if device.type == "cpu" else partial(_in_pieces, parts[name], device, dtype)
        return shard_of(model.get_submodule(owner), leaf, partial(get, reader)).to(device, dtype)

    bad = []
    with ThreadPoolExecutor(READERS) as pool:
        for name, tensor in _in_order(pool, read, list(parts)):
            if finite and not tensor.isfinite().all():
                bad.append(f"{name} (from {parts[name].key})")
            owner, _, leaf = name.rpartition(".")
            module: Any = model.get_submodule(owner)
            old = module._parameters[leaf]
            module.register_parameter(leaf, nn.Parameter(resharded(old, tensor), old.requires_grad))
    if bad:
        raise CheckpointError(f"not finite: {', '.join(bad)}")


def _in_pieces(part: Part, device: torch.device, dtype: torch.dtype, reader: Reader, index: Index = ()) -> Tensor:
    """What `part.read(reader, index)` gives, on another device."""
    shape = part.shape(reader)
    dim = 1 if part.turned else 0  # that of the file's rows
    index = (*index, *[slice(0, n) for n in shape[len(index) :]])
    sizes = [s.stop - s.start for s in index]
    nbytes = prod(sizes) * reader.dtype(part.key).itemsize
    if nbytes <= PIECE:
        return part.read(reader, index).to(device, dtype)
    whole = torch.empty(sizes, dtype=dtype, device=device)
    start = index[dim].start
    for piece in whole.split(max(1, sizes[dim] * PIECE // nbytes), dim):
        stop = start + piece.shape[dim]
        piece.copy_(part.read(reader, (*index[:dim], slice(start, stop), *index[dim + 1 :])))
        start = stop
    return whole


def _in_order(pool: ThreadPoolExecutor, read: Callable[[str], Tensor], names: Sequence[str]) -> Iterator:
    """Pairs of name and tensor, at most `READERS` of them read ahead."""
    waiting: list = []
    for name in names:
        waiting.append((name, pool.submit(read, name)))
        if len(waiting) > READERS:
            first, future = waiting.pop(0)
            yield first, future.result()
    for name, future in waiting:
        yield name, future.result()


def common_dtype(parts: Mapping[str, Part], reader: Reader, device: torch.device) -> torch.dtype:
    """The checkpoint's own type: of its first floating tensor; GGUF becomes fp32 on a CPU, bf16 elsewhere."""
    if reader.files[0].suffix == ".gguf":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    kinds: Sequence[torch.dtype] = [reader.dtype(part.key) for part in parts.values()]
    return next((kind for kind in kinds if kind.is_floating_point), torch.get_default_dtype())
