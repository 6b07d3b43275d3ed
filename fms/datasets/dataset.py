"""A data set: batches of rows, in a shuffled order that can be taken up again anywhere."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from fms.datasets.corpus import Corpus
from fms.datasets.packing import Rows, collate


class Dataset:
    """Rows of `seq_len` tokens. Documents and then rows are shuffled anew each epoch, by `seed` and the epoch.

    All ranks walk the same sequence of rows and take turns, so that the position is one for all of them and a training
    can go on with another number of ranks or another batch size.
    """

    def __init__(
        self,
        corpus: Corpus,
        pad_id: int,
        *,
        seq_len: int,
        seed: int,
        rank: int,
        world: int,
        pack: bool,
        reset_attention: bool,
        epochs: int | None,
        shuffle: bool,
        restarts: bool,
        bad_records: int = 0,
    ) -> None:
        """`restarts`: each call of `batches` begins at the beginning, not where the last one was left."""
        self.corpus, self.pad_id, self.seq_len, self.seed = corpus, pad_id, seq_len, seed
        self.rank, self.world, self.pack, self.reset_attention = rank, world, pack, reset_attention
        self.epochs, self.shuffle, self.restarts = epochs, shuffle, restarts
        self.bad_records = bad_records  # that were passed over
        self.epoch = self.row = 0  # of what `batches` takes next
        self._held: tuple[int, Rows, np.ndarray] | None = None
        self._resumed = False

    @property
    def documents(self) -> int:
        return len(self.corpus.lengths)

    @property
    def tokens(self) -> int:
        """Of all documents together; an epoch has fewer where documents are cut to `seq_len`."""
        return int(self.corpus.lengths.sum())

    @property
    def rows(self) -> int:
        """Of the epoch that `batches` is in; epochs differ a little where documents are kept whole."""
        return len(self._epoch()[0])

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Dicts of (batch_size, seq_len) int64: input_ids, labels; position_ids, document_ids with `reset_attention`.

        Every rank gets the same number of batches. After the last epoch rows of padding fill the last ones: a batch may
        then have no label that counts.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if self.restarts and not self._resumed:
            self.epoch = self.row = 0
        self._resumed = False
        while group := self._take(batch_size * self.world):
            mine = group[self.rank * batch_size : (self.rank + 1) * batch_size]
            mine += [[]] * (batch_size - len(mine))
            yield collate(self.corpus, mine, self.seq_len, self.pad_id, self.reset_attention)

    def _take(self, n: int) -> list[list[tuple[int, int, int]]]:
        """The next rows of all ranks; fewer at the end."""
        taken: list[list[tuple[int, int, int]]] = []
        while len(taken) < n and (self.epochs is None or self.epoch < self.epochs):
            rows, order = self._epoch()
            chosen = order[self.row : self.row + n - len(taken)]
            taken += [list(rows.segments(int(row))) for row in chosen]
            self.row += len(chosen)
            if self.row == len(rows):
                self.epoch, self.row = self.epoch + 1, 0
        return taken

    def _epoch(self) -> tuple[Rows, np.ndarray]:
        if self._held is None or self._held[0] != self.epoch:
            draw = np.random.default_rng([self.seed, self.epoch])
            arrange = draw.permutation if self.shuffle else np.arange
            rows = Rows(self.corpus, arrange(self.documents), self.seq_len, self.pack)
            self._held = self.epoch, rows, arrange(len(rows))
        return self._held[1:]

    def state_dict(self) -> dict[str, Any]:
        """Where the batches that were handed out end, and what it is a place in; the same on every rank. Plain JSON."""
        return {"epoch": self.epoch, "row": self.row, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. Raises `ValueError` where it is a place in other data, or in another order of it."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved place is one in data with {name}={state.get(name)!r}, here it is {value!r}: "
                    "give the same data and settings, or begin it anew"
                )
        self.epoch, self.row, self._resumed = int(state["epoch"]), int(state["row"]), True

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "pack": self.pack,
            "shuffle": self.shuffle,
            "documents": self.documents,
            "tokens": self.tokens,
            "content": hashlib.blake2b(self.corpus.keys.tobytes(), digest_size=8).hexdigest(),
        }
