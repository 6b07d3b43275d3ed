"""Rows of seq_len tokens out of documents of any length."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fms.datasets.corpus import Corpus
from fms.utils.labels import IGNORED


class Rows:
    """One epoch's documents in their order, as a stream that is cut into rows.

    Without `pack` a row is the beginning of one document. With it documents follow each other: those to be kept whole
    (where only some tokens are to be learnt) are cut to seq_len and a row takes as many as fit; others go on in
    the next row, so that every row but the last is full.
    """

    def __init__(self, corpus: Corpus, order: NDArray[np.int64], seq_len: int, pack: bool) -> None:
        lengths = corpus.lengths[order]
        if corpus.counted or not pack:
            lengths = np.minimum(lengths, seq_len)
        self.order, self.ends = order, np.cumsum(lengths)
        self.starts = self.ends - lengths
        total = int(self.ends[-1])
        if not pack:
            self.cuts = np.append(self.starts, total)
        elif corpus.counted:
            self.cuts = np.array([*_whole(self.starts, self.ends, seq_len), total])
        else:
            self.cuts = np.append(np.arange(0, total, seq_len), total)

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def segments(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(document, start, stop) of what a row consists of."""
        at, end = int(self.cuts[row]), int(self.cuts[row + 1])
        i = int(np.searchsorted(self.ends, at, side="right"))
        while at < end:
            stop = min(end, int(self.ends[i]))
            yield int(self.order[i]), at - int(self.starts[i]), stop - int(self.starts[i])
            at, i = stop, i + 1


def _whole(starts: NDArray[np.int64], ends: NDArray[np.int64], seq_len: int) -> Iterator[int]:
    cut = 0
    yield cut
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end - cut > seq_len:
            cut = start
            yield cut


def collate(
    corpus: Corpus, rows: list[list[tuple[int, int, int]]], seq_len: int, pad_id: int, reset_attention: bool
) -> dict[str, Tensor]:
    """(b, s) int64 each. Padding, of a label that does not count, follows the segments of a row.

    With `reset_attention` positions begin anew at each document, padding is the last document of its row, and no
    document is asked to foresee the first token of the next one.
    """
    shape = (len(rows), seq_len)
    input_ids, labels = np.full(shape, pad_id), np.full(shape, IGNORED)
    position_ids, document_ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for b, segments in enumerate(rows):
        at = 0
        for n, (document, start, stop) in enumerate(segments):
            ids, learnt = corpus.read(document, start, stop)
            place = (b, slice(at, at + len(ids)))
            input_ids[place] = ids
            labels[place] = ids if learnt is None else np.where(learnt, ids, IGNORED)
            position_ids[place] = np.arange(len(ids))
            document_ids[place] = n
            if reset_attention:
                labels[b, at] = IGNORED
            at += len(ids)
        position_ids[b, at:] = np.arange(seq_len - at)
        document_ids[b, at:] = len(segments)
    batch = {"input_ids": input_ids, "labels": labels}
    if reset_attention:
        batch |= {"position_ids": position_ids, "document_ids": document_ids}
    return {name: torch.from_numpy(array) for name, array in batch.items()}
