"""Rows out of documents: nothing is lost, nothing is twice, documents stay apart."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fms.datasets.corpus import MemoryCorpus
from fms.datasets.packing import Rows, collate
from fms.training.loss import IGNORED
from tests.small import small_model

LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=12)


def corpus(lengths: list[int], counted: bool = False) -> MemoryCorpus:
    """Every token of its own; of counted documents the second half is to be learnt."""
    sizes = np.array(lengths, dtype=np.int64)
    learnt = np.concatenate([np.arange(n) >= n // 2 for n in lengths]) if counted else None
    keys = np.arange(len(lengths), dtype=np.uint64)
    return MemoryCorpus(np.arange(sizes.sum(), dtype=np.int32), learnt, np.cumsum(sizes) - sizes, sizes, keys)


def flat(lists) -> list[int]:
    return list(chain.from_iterable(lists))


def tokens(rows: Rows, data: MemoryCorpus) -> list[list[int]]:
    parts = [[data.read(*segment)[0].tolist() for segment in rows.segments(i)] for i in range(len(rows))]
    return [flat(row) for row in parts]


@given(LENGTHS, st.integers(1, 9), st.randoms())
def test_packing_keeps_every_token_once_and_in_the_order_of_the_documents(lengths, seq_len, random):
    data = corpus(lengths)
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = tokens(Rows(data, np.array(order), seq_len, pack=True), data)
    assert flat(rows) == [t for d in order for t in data.read(d, 0, lengths[d])[0].tolist()]
    assert [len(row) for row in rows[:-1]] == [seq_len] * (len(rows) - 1)
    assert 0 < len(rows[-1]) <= seq_len


@given(LENGTHS, st.integers(1, 30))
def test_documents_with_a_prompt_stay_whole(lengths, seq_len):
    data = corpus(lengths, counted=True)
    rows = Rows(data, np.arange(len(lengths)), seq_len, pack=True)
    segments = [segment for i in range(len(rows)) for segment in rows.segments(i)]
    assert segments == [(d, 0, min(n, seq_len)) for d, n in enumerate(lengths)]
    sizes = [len(row) for row in tokens(rows, data)]
    assert max(sizes) <= seq_len
    firsts = [next(rows.segments(i))[2] for i in range(1, len(rows))]
    assert all(size + first > seq_len for size, first in zip(sizes, firsts, strict=False)), "a row had room for more"


@given(LENGTHS, st.integers(1, 30))
def test_without_packing_a_row_is_a_document(lengths, seq_len):
    data = corpus(lengths)
    rows = Rows(data, np.arange(len(lengths)), seq_len, pack=False)
    assert [list(rows.segments(i)) for i in range(len(rows))] == [
        [(d, 0, min(n, seq_len))] for d, n in enumerate(lengths)
    ]


def test_a_batch_by_hand():
    data = corpus([3, 4], counted=True)
    batch = collate(data, [[(0, 0, 3), (1, 0, 4)], []], 9, pad_id=99, reset_attention=True)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 99, 99], [99] * 9]
    assert batch["labels"].tolist() == [[IGNORED, 1, 2, IGNORED, IGNORED, 5, 6, IGNORED, IGNORED], [IGNORED] * 9]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1], [*range(9)]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9]


def test_the_first_token_of_a_document_counts_only_where_attention_is_not_reset():
    data = corpus([3, 3])
    segments = [[(0, 0, 3), (1, 0, 3)]]
    plain, reset = (collate(data, segments, 6, 0, reset_attention=reset) for reset in (False, True))
    assert plain.keys() == {"input_ids", "labels"}
    assert plain["labels"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert reset["labels"].tolist() == [[IGNORED, 1, 2, IGNORED, 4, 5]]


def test_with_attention_reset_a_model_sees_each_document_as_if_it_were_alone():
    lengths, model = [5, 7, 4], small_model()
    data = corpus(lengths)
    batch = collate(data, [[(d, 0, n) for d, n in enumerate(lengths)]], 18, pad_id=0, reset_attention=True)
    ids, documents = batch["input_ids"], batch["document_ids"]
    mask = (documents[:, :, None] == documents[:, None]).tril()[:, None]
    with torch.no_grad():
        packed = model(ids, position_ids=batch["position_ids"], mask=mask)[0]
        alone = [model(ids[:, a : a + n])[0] for a, n in zip([0, 5, 12], lengths, strict=True)]
    torch.testing.assert_close(packed[:16], torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert (packed[5:12] - model(ids)[0, 5:12]).abs().max() > 0.1, "the mask makes no difference"


@pytest.mark.parametrize("pack", [True, False])
def test_an_empty_document_takes_no_place(pack):
    data = corpus([2, 3])
    data.lengths[0] = 0
    rows = Rows(data, np.array([0, 1]), 4, pack)
    assert [segment for i in range(len(rows)) for segment in rows.segments(i)] == [(1, 0, 3)]


def test_positions_of_a_document_that_goes_on_begin_anew_in_its_next_row():
    batch = collate(corpus([8, 3]), [[(0, 5, 8), (1, 0, 2)]], 5, 0, reset_attention=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
