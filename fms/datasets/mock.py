"""Documents made up of random ids, for trying out a training: each repeats a phrase, so there is something to learn."""

import numpy as np

from fms.datasets.corpus import MemoryCorpus, keys_of
from fms.datasets.records import BadRecords
from fms.utils.tokenizers import BaseTokenizer


def corpus(
    tokenizer: BaseTokenizer,
    path: None,
    bad: BadRecords,
    *,
    documents: int = 1000,
    length: int = 256,
    phrase: int = 8,
    vocab_size: int | None = None,
) -> MemoryCorpus:
    """`documents` of `length` / 2 to `length` tokens below `vocab_size` (the tokenizer's); always the same ones."""
    if path is not None:
        raise ValueError(f"mock data takes no path, got {path}; for a file: get_dataset('text', tokenizer, path)")
    if min(documents, phrase) < 1 or length < 2:
        raise ValueError(f"documents={documents} and phrase={phrase} must be at least 1, length={length} at least 2")
    draw = np.random.default_rng(0)
    lengths = draw.integers(length // 2, length, documents, endpoint=True)
    phrases = draw.integers(vocab_size or tokenizer.vocab_size(), size=(documents, phrase), dtype=np.int32)
    parts = [np.resize(words, n) for words, n in zip(phrases, lengths, strict=True)]
    starts = np.cumsum(lengths) - lengths
    return MemoryCorpus(np.concatenate(parts), None, starts, lengths, keys_of(part.tobytes() for part in parts))
