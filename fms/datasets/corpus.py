"""Documents as tokens: what a source gives, and which of them are held out."""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fms.datasets.records import BadRecords

Ints = NDArray[np.integer]
Tokens = tuple[Sequence[int], Sequence[bool] | None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One document before it is tokens: where it stands (file:line), its text, which names it, and how it is encoded.

    `encode` returns ids and, where only some of them are to be learnt, which (else None); a `ValueError` of it is a bad
    record.
    """

    where: str
    text: str
    encode: Callable[[], Tokens]


class Corpus(Protocol):
    """Documents as tokens, in a fixed order."""

    keys: NDArray[np.uint64]
    """(documents,): a hash of each one's content."""
    lengths: NDArray[np.int64]
    """(documents,): how many tokens each one has."""
    counted: bool
    """Whether only some tokens are to be learnt: such documents are kept whole."""

    def read(self, document: int, start: int, stop: int) -> tuple[Ints, NDArray[np.bool_] | None]:
        """Ids of a part of a document, and which of them are to be learnt (None: all)."""
        ...

    def select(self, chosen: Ints) -> "Corpus":
        """Of these documents alone."""
        ...


@dataclass
class MemoryCorpus:
    """Tokens in memory, one document after another: 4 bytes each, and one more where only some are to be learnt."""

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_] | None
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    keys: NDArray[np.uint64]
    counted: bool = field(init=False)

    def __post_init__(self) -> None:
        self.counted = self.learnt is not None

    def read(self, document: int, start: int, stop: int) -> tuple[Ints, NDArray[np.bool_] | None]:
        part = slice(self.starts[document] + start, self.starts[document] + stop)
        return self.ids[part], None if self.learnt is None else self.learnt[part]

    def select(self, chosen: Ints) -> "MemoryCorpus":
        return MemoryCorpus(self.ids, self.learnt, self.starts[chosen], self.lengths[chosen], self.keys[chosen])


def encode(
    records: Sequence[Record], keys: NDArray[np.uint64], limit: int, bad: BadRecords, show: bool
) -> MemoryCorpus:
    """Tokenise. An example of which the first `limit` tokens have none to be learnt is left out, and that is said."""
    from tqdm import tqdm

    ids: list[NDArray[np.int32]] = []
    learnt: list[NDArray[np.bool_] | None] = []
    kept, unlearnt, first = [], 0, ""
    hidden = not (show and sys.stderr.isatty())
    for i, record in enumerate(tqdm(records, desc="tokenising", unit=" documents", disable=hidden, leave=False)):
        try:
            tokens, which = record.encode()
        except ValueError as error:
            bad.report(record.where, str(error))
            continue
        if which is not None and not any(which[1:limit]):
            unlearnt, first = unlearnt + 1, first or record.where
            continue
        ids.append(np.asarray(tokens, dtype=np.int32))
        learnt.append(None if which is None else np.asarray(which, dtype=bool))
        kept.append(i)
    if unlearnt and show:
        logger.warning(
            "%d examples left out: their first seq_len=%d tokens have no answer, the first is %s",
            unlearnt,
            limit,
            first,
        )
    lengths = np.array([len(part) for part in ids], dtype=np.int64)
    return MemoryCorpus(
        np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32),
        None if all(which is None for which in learnt) else np.concatenate(_filled(learnt, lengths)),
        np.cumsum(lengths) - lengths,
        lengths,
        keys[kept],
    )


def _filled(learnt: list[NDArray[np.bool_] | None], lengths: Ints) -> list[NDArray[np.bool_]]:
    return [np.ones(n, dtype=bool) if which is None else which for which, n in zip(learnt, lengths, strict=True)]


def keys_of(contents: Iterable[bytes]) -> NDArray[np.uint64]:
    """Eight bytes of a hash of each."""
    return np.array([int.from_bytes(hashlib.blake2b(c, digest_size=8).digest()) for c in contents], dtype=np.uint64)


def take(keys: NDArray[np.uint64], held_out: float, which: str) -> NDArray[np.int64]:
    """Which documents are in "train" or in "held_out": those with the smallest keys are held out, at least one.

    Equal documents fall on the same side. A single document is all for training. Raises `ValueError` where nothing
    can be held out.
    """
    if which not in ("train", "held_out"):
        raise ValueError(f"split={which!r} must be 'train' or 'held_out'")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out} must lie in [0, 1): the share of documents that is not trained on")
    different = np.unique(keys)
    n = min(max(1, round(held_out * len(different))), len(different) - 1) if held_out else 0
    if which == "held_out" and not n:
        raise ValueError(
            f"nothing is held out: held_out={held_out} of {len(different)} different documents; "
            "a share above 0 and two documents are required"
        )
    aside = keys <= different[n - 1] if n else np.zeros(len(keys), dtype=bool)
    return np.flatnonzero(aside if which == "held_out" else ~aside)
