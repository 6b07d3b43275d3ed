"""Checkpoints from one format to another, saved from a model, and looked over."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fms.models.registry import describe
from fms.modules.tp import unpadded
from fms.utils.devices import dtype_of
from fms.utils.embedding import recipe_files
from fms.utils.serialization.checkpoint import OWN_VERSION, Checkpoint, open_checkpoint
from fms.utils.serialization.errors import nearest
from fms.utils.serialization.generation_config import FILE, generation_defaults
from fms.utils.serialization.loading import common_dtype, plan
from fms.utils.serialization.sources import get_source, list_sources
from fms.utils.serialization.tables import Part, entries
from fms.utils.serialization.writers import (
    MANIFEST,
    Entry,
    Progress,
    verify_manifest,
    write_manifest,
    write_pickle,
    write_safetensors,
    writing,
)
from fms.utils.tokenizers import BaseTokenizer, get_tokenizer

log = logging.getLogger(__name__)

FORMATS = ("hf", "meta", "fms", "own")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def convert(
    path: str | Path,
    out: str | Path,
    to: str,
    *,
    source: str | None = None,
    architecture: str | None = None,
    variant: str | None = None,
    data_type: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint `path` as the directory `out` in the format `to`, with its tokenizer, one tensor at a time.

    Values are the same bit for bit unless `data_type` changes them. Returns the directory, which appears whole or not
    at all. Raises `CheckpointError` if the format can't hold the model, `ValueError` if `out` is not empty.
    """
    checkpoint = open_checkpoint(path, source, architecture)
    with torch.device("meta"):
        model = describe(checkpoint, variant, {})
    parts = plan(model, checkpoint)
    reader = checkpoint.reader
    dtype = dtype_of(data_type)
    if dtype is None and checkpoint.source == "gguf":
        dtype = common_dtype(parts, reader, torch.device("cpu"))

    def entry(name: str, part: Part) -> Entry:
        kind = dtype or reader.dtype(part.key)
        return Entry(name, part.shape(reader), kind, lambda: part.read(reader).to(kind))

    state = [entry(name, part) for name, part in parts.items()]
    try:
        tokenizer = _tokenizer(checkpoint)
    except ValueError as error:
        log.warning("the tokenizer is left behind: %s", error)
        tokenizer = None
    beside = checkpoint.path if checkpoint.path.is_dir() else None
    return _write(model, state, out, to, generation_defaults(checkpoint), tokenizer, overwrite, progress, beside)


def save_model(
    model: Any,
    out: str | Path,
    to: str = "own",
    *,
    tokenizer: BaseTokenizer | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model, frozen or not, as the directory `out` in the format `to`; `get_model(model_path=out)` reads it.

    All ranks that hold a model which is split over them call this: they gather one tensor at a time, the first of them
    writes, and a failure is raised by all.
    """
    parameters = dict(model.named_parameters())
    defaults = getattr(model, "generation_defaults", {})

    def write(whole: Callable[[str], Tensor]) -> Path:
        state = []
        for name, p in parameters.items():
            owner, _, leaf = name.rpartition(".")
            shape = unpadded(model.get_submodule(owner), leaf)
            state.append(Entry(name, shape, p.dtype, partial(_cut, whole, name, shape)))
        return _write(model, state, out, to, defaults, tokenizer, overwrite, progress)

    if not any(hasattr(p, "_spec") for p in parameters.values()):
        return write(lambda name: parameters[name].detach())
    from fms.distributed.saving import save_together

    return save_together(parameters, write)


def _cut(whole: Callable[[str], Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter without the zeros that made its heads divide."""
    return whole(name)[tuple(slice(n) for n in shape)]


def validate(
    path: str | Path,
    *,
    source: str | None = None,
    architecture: str | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """What is wrong with a checkpoint, a line each: its files against their manifest, its configuration, names and
    shapes, values that are not finite, a tokenizer that does not fit. Reads everything; empty means good."""
    problems: list[str] = []
    given = Path(path).expanduser()
    if (given / MANIFEST).is_file():
        problems += verify_manifest(given)
    try:
        checkpoint = open_checkpoint(path, source, architecture)
        with torch.device("meta"):
            model = describe(checkpoint, variant, {})
        parts = plan(model, checkpoint)
        generation_defaults(checkpoint)
    except (ValueError, KeyError) as error:
        return [*problems, *str(error.args[0]).split("\n  ")]
    problems += _not_finite(checkpoint, parts, progress)
    try:
        tokenizer = _tokenizer(checkpoint)
    except ValueError as error:
        return [*problems, str(error)]
    if tokenizer is not None and tokenizer.vocab_size() > (size := model.config.src_vocab_size):
        problems.append(f"the tokenizer has {tokenizer.vocab_size()} tokens, the model's vocabulary {size}")
    return problems


def _not_finite(checkpoint: Checkpoint, parts: Mapping[str, Part], progress: Progress | None) -> Iterator[str]:
    reader = checkpoint.reader
    total = sum(_nbytes(part, checkpoint) for part in parts.values())
    done = 0
    for part in parts.values():
        tensor = part.read(reader)
        if bad := int((~tensor.isfinite()).sum()):
            yield f"{part.key}: {bad} of {tensor.numel()} values are NaN or infinite"
        done += _nbytes(part, checkpoint)
        if progress:
            progress(done, total)


def _nbytes(part: Part, checkpoint: Checkpoint) -> int:
    return torch.Size(part.shape(checkpoint.reader)).numel() * checkpoint.reader.dtype(part.key).itemsize


def _write(
    model: Any,
    state: list[Entry],
    out: str | Path,
    to: str,
    defaults: Mapping[str, Any],
    tokenizer: BaseTokenizer | None,
    overwrite: bool,
    progress: Progress | None,
    beside: Path | None = None,
) -> Path:
    architecture, config = model.architecture, model.config
    known = [name for name in FORMATS if name in list_sources(architecture)]
    if to not in known:
        raise ValueError(f"{architecture} can't be written as {to!r}{nearest(to, known)}, only as {', '.join(known)}")
    if to == "own":
        settings: dict[str, Any] = {
            "format": "fms",
            "version": OWN_VERSION,
            "architecture": architecture,
            "config": config.as_dict(),
        }
    else:
        target = get_source(architecture, to)
        if to in ("fms", "meta"):  # which keep both names of a tied pair
            names = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {e.name for e in state}
            state = state + [e._replace(name=name) for e in state if e.name == "embedding.weight" for name in names]
        state = entries(target.rules, state, config)
        settings = target.config.write(config) if target.config else {}
    if to == "hf":
        dtype = str(state[0].dtype).removeprefix("torch.")
        settings |= {"torch_dtype": dtype, "dtype": dtype}
        ends: Any = tokenizer.eos_token_ids if tokenizer else ()
        ends = defaults.get("eos_token_id", ends[0] if len(ends) == 1 else ends or None)
        # said even if there is none: transformers fills in Llama 2's for what is absent
        settings |= {"bos_token_id": tokenizer.bos_token_id if tokenizer else None, "eos_token_id": ends}
    state = _counted(state, progress)
    with writing(out, overwrite) as directory:
        if to == "meta":
            write_pickle(directory / "consolidated.00.pth", state)
        else:
            write_safetensors(directory, state)
        if settings:
            _dump(directory / ("params.json" if to == "meta" else "config.json"), settings)
        if defaults and to in ("hf", "own"):
            _dump(directory / FILE, dict(defaults))
        if tokenizer is not None:
            tokenizer.save(directory)
        if beside is not None:
            for name in recipe_files(beside):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(beside / name, directory / name)
        write_manifest(directory)
    return Path(out).expanduser()


def _counted(state: list[Entry], progress: Progress | None) -> list[Entry]:
    """The same, telling `progress` of each tensor that is made."""
    if progress is None:
        return state
    total, done = sum(entry.nbytes for entry in state), 0

    def counting(entry: Entry) -> Callable[[], Tensor]:
        def make() -> Tensor:
            nonlocal done
            done += entry.nbytes
            progress(done, total)
            return entry.make()

        return make

    return [entry._replace(make=counting(entry)) for entry in state]


def _tokenizer(checkpoint: Checkpoint) -> BaseTokenizer | None:
    """The one beside the weights, or in the GGUF file, if there is one. Raises `ValueError` if it can't be read."""
    path = checkpoint.path
    if checkpoint.source == "gguf":
        there = "tokenizer.ggml.model" in checkpoint.reader.metadata  # type: ignore[attr-defined]
    else:
        path = path if path.is_dir() else path.parent
        there = any((path / name).is_file() for name in TOKENIZER_FILES)
    return get_tokenizer(path) if there else None


def _dump(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
