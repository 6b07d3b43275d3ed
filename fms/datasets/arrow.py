"""Shards of tokens in Arrow files, which are mapped into memory rather than read: write them, train on them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fms.datasets.corpus import Corpus, Ints, keys_of
from fms.datasets.records import BadRecords, files
from fms.utils.tokenizers import BaseTokenizer


class ArrowCorpus:
    """Documents in record batches: of a batch all tokens one after another, and where each document begins."""

    counted = False

    def __init__(self, batches: list[tuple[str, Ints, Ints]], keys: NDArray[np.uint64], vocab_size: int) -> None:
        """`batches`: (file, tokens, offsets (documents + 1,)) each."""
        self.batches, self.keys, self.vocab_size = batches, keys, vocab_size
        self.lengths = np.concatenate([np.diff(offsets) for *_, offsets in batches]).astype(np.int64)
        self._firsts = np.cumsum([0, *(len(offsets) - 1 for *_, offsets in batches)])
        self._chosen: Ints = np.arange(len(keys))

    def read(self, document: int, start: int, stop: int) -> tuple[Ints, None]:
        document = int(self._chosen[document])
        n = int(np.searchsorted(self._firsts, document, side="right")) - 1
        file, tokens, offsets = self.batches[n]
        at = int(offsets[document - self._firsts[n]])
        ids = tokens[at + start : at + stop]
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"{file}: the id {ids.max() if ids.max() >= self.vocab_size else ids.min()} is not one of the "
                f"tokenizer's {self.vocab_size}: these shards were made with another one"
            )
        return ids, None

    def select(self, chosen: Ints) -> "ArrowCorpus":
        part = ArrowCorpus(self.batches, self.keys[chosen], self.vocab_size)
        part.lengths, part._chosen = self.lengths[chosen], self._chosen[chosen]
        return part


def corpus(
    tokenizer: BaseTokenizer,
    path: str | Path | Iterable[str | Path],
    bad: BadRecords,
    *,
    column: str = "tokens",
    pattern: str | None = None,
) -> Corpus:
    """What `fms tokenize` wrote, or any Arrow IPC files with a column of lists of integers; empty lists are left out.

    A column `key`, if there is one, says which documents are held out, so that they are the same as of the text.
    """
    pa = _pyarrow()
    batches: list[tuple[str, Ints, Ints]] = []
    keys: list[NDArray[np.uint64]] = []
    for file in files(path, (".arrow",), pattern):
        try:
            with pa.memory_map(str(file)) as source:
                reader = pa.ipc.open_file(source)
                _check(file, reader.schema, column, tokenizer, pa)
                found = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            bad.report(str(file), f"not an Arrow file that is whole: {error}")
            continue
        for batch in found:
            lists = batch.column(column)
            offsets, tokens = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
            batches.append((str(file), tokens, offsets))
            if "key" in batch.schema.names:
                keys.append(batch.column("key").to_numpy())
            else:
                keys.append(keys_of(tokens[a:b].astype("<i4").tobytes() for a, b in _pairs(offsets)))
    if not batches:
        raise ValueError(f"{path}: there is no document")
    whole = ArrowCorpus(batches, np.concatenate(keys), tokenizer.vocab_size())
    return whole.select(np.flatnonzero(whole.lengths))


def _check(file: Path, schema: Any, column: str, tokenizer: BaseTokenizer, pa: Any) -> None:
    if column not in schema.names:
        raise ValueError(f"{file}: there is no column {column!r}; there are {', '.join(schema.names)} (column=NAME)")
    kind = schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"{file}: the column {column!r} must hold lists of integers, not {kind}")
    made = json.loads((schema.metadata or {}).get(b"fms", b"{}"))
    if made.get("vocab_size", tokenizer.vocab_size()) != tokenizer.vocab_size():
        raise ValueError(
            f"{file}: made with {made.get('tokenizer', 'a tokenizer')} of {made['vocab_size']} ids; "
            f"the tokenizer given has {tokenizer.vocab_size()}"
        )


def _pairs(offsets: Ints) -> Iterator[tuple[int, int]]:
    return zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)


class ShardWriter:
    """Writes documents into `directory`/00000.arrow and on, a new file after `shard_tokens` tokens."""

    batch_tokens = 1 << 20

    def __init__(self, directory: Path, shard_tokens: int, made_with: dict[str, Any]) -> None:
        pa = self._pa = _pyarrow()
        fields = [("tokens", pa.large_list(pa.int32())), ("key", pa.uint64())]
        self._schema = pa.schema(fields, metadata={"fms": json.dumps(made_with)})
        self.directory, self.shard_tokens = directory, shard_tokens
        self.shards = self.documents = self.tokens = 0
        self._ids: list[Ints] = []
        self._keys: list[int] = []
        self._file: Any = None
        self._waiting = self._written = 0

    def add(self, ids: Sequence[int], key: int) -> None:
        self._ids.append(np.asarray(ids, dtype=np.int32))
        self._keys.append(key)
        self._waiting += len(ids)
        self.documents += 1
        self.tokens += len(ids)
        full = self._written + self._waiting >= self.shard_tokens
        if full or self._waiting >= self.batch_tokens:
            self._flush()
        if full:
            self.close()

    def close(self) -> None:
        """End the shard that is open, if one is."""
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file, self._written = None, 0

    def _flush(self) -> None:
        if not self._ids:
            return
        pa = self._pa
        if self._file is None:
            self._file = pa.ipc.new_file(str(self.directory / f"{self.shards:05d}.arrow"), self._schema)
            self.shards += 1
        offsets = np.cumsum([0, *map(len, self._ids)])
        tokens = np.concatenate(self._ids)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens))
        keys = pa.array(np.array(self._keys, dtype=np.uint64))
        self._file.write_batch(pa.record_batch([lists, keys], schema=self._schema))
        self._written += self._waiting
        self._ids, self._keys, self._waiting = [], [], 0


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ModuleNotFoundError:
        raise ImportError("Arrow files need pyarrow: pip install 'foundation-model-stack[data]'") from None
    return pyarrow
