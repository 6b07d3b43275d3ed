"""Data to train on: `get_dataset(name, tokenizer, path)` gives batches; `register_dataset` adds a kind of data."""

import inspect
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fms.datasets import arrow, hub, instruction, mock, text
from fms.datasets.corpus import Corpus, Record, encode, keys_of, take
from fms.datasets.dataset import Dataset
from fms.datasets.records import BadRecordError, BadRecords
from fms.utils.serialization.errors import nearest
from fms.utils.tokenizers import BaseTokenizer

__all__ = ["BadRecordError", "Dataset", "Record", "get_dataset", "list_datasets", "register_dataset"]
Source = Callable[..., Iterable[Record] | Corpus]
logger = logging.getLogger(__name__)

_SOURCES: dict[str, Source] = {
    "text": text.records,
    "instruction": instruction.records,
    "arrow": arrow.corpus,
    "huggingface": hub.records,
    "mock": mock.corpus,
}


def register_dataset(name: str, source: Source) -> None:
    """Make `get_dataset(name, ...)` call `source(tokenizer, path, bad, **options)`, which gives records or a corpus.

    Its keyword-only parameters are the options that a user may give. Raises `ValueError` for a name that is taken.
    """
    if name in _SOURCES:
        raise ValueError(f"there is a data set {name!r} already; there are {', '.join(_SOURCES)}")
    _SOURCES[name] = source


def list_datasets() -> list[str]:
    return list(_SOURCES)


def get_dataset(
    name: str,
    tokenizer: BaseTokenizer,
    path: str | Path | None = None,
    *,
    seq_len: int = 1024,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    pack: bool = True,
    reset_attention: bool = False,
    epochs: int | None = None,
    split: str = "train",
    held_out: float = 0.05,
    shuffle: bool | None = None,
    on_bad_record: str = "raise",
    **options: Any,
) -> Dataset:
    """Data of the kind `name`: text, instruction, arrow, huggingface, mock, or one that was registered.

    Rows have `seq_len` tokens: of documents after one another, or with `pack=False` of one document each; with
    `reset_attention` batches say where each begins. This process is `rank` of `world` that share the rows (of those
    that share a model, all are one rank). A share `held_out` of the documents, chosen by their content, is left to
    `split="held_out"`, which is not shuffled and ends after one epoch; training ends after `epochs`, or never.
    `options` are those of the kind of data. Raises `ValueError` for a name, an option or a number that cannot be, and
    `BadRecordError` for a record that cannot be used, unless `on_bad_record="skip"` passes over it.
    """
    if name not in _SOURCES:
        raise ValueError(f"there is no data set {name!r}{nearest(name, _SOURCES)}; there are {', '.join(_SOURCES)}")
    _check_numbers(seq_len=seq_len, world=world, epochs=1 if epochs is None else epochs)
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must lie in [0, {world}), the number of ranks")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    bad = BadRecords(on_bad_record)
    corpus = _choose(name, tokenizer, path, bad, options, split, held_out, seq_len, rank == 0)
    if bad.count and rank == 0:
        logger.warning("bad records passed over: %d, the first is %s", bad.count, bad.first)
    if not corpus.lengths.any():
        raise ValueError(f"{path or name}: no document is left for {split!r} ({bad.count} bad records)")
    training = split == "train"
    padding = tokenizer.pad_token_id, tokenizer.eos_token_id, 0
    return Dataset(
        corpus,
        next(i for i in padding if i is not None),
        seq_len=seq_len,
        seed=seed,
        rank=rank,
        world=world,
        pack=pack,
        reset_attention=reset_attention,
        epochs=epochs if training or epochs else 1,
        shuffle=training if shuffle is None else shuffle,
        restarts=not training,
        bad_records=bad.count,
    )


def _choose(
    name: str,
    tokenizer: BaseTokenizer,
    path: str | Path | None,
    bad: BadRecords,
    options: dict[str, Any],
    which: str,
    held_out: float,
    seq_len: int,
    show: bool,
) -> Corpus:
    """The documents of one side of the split; only these are tokenised."""
    source = _SOURCES[name]
    known = [p.name for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{name} data has no option {option!r}{nearest(option, known)}; {has}")
    if path is None and name in ("text", "arrow", "huggingface"):
        raise ValueError(f"{name} data needs a path: --dataset_path PATH (path=PATH)")
    found = source(tokenizer, path, bad, **options)
    if isinstance(found, Iterable):
        records = list(found)
        keys = keys_of(record.text.encode("utf-8", "surrogatepass") for record in records)
        chosen = take(keys, held_out, which)
        return encode([records[i] for i in chosen], keys[chosen], seq_len, bad, show)
    return found.select(take(found.keys, held_out, which))


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
