"""The order of batches: seeded, shared by ranks, and taken up again anywhere."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fms.datasets import Dataset, get_dataset, list_datasets, register_dataset
from fms.datasets.corpus import Record
from fms.training.loss import IGNORED
from fms.utils.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer()


def mock(**options) -> Dataset:
    return get_dataset("mock", TOKENIZER, **{"documents": 30, "length": 20, "seq_len": 16, "epochs": 2, **options})


def ids(batches) -> list[list[int]]:
    """Rows, those of nothing but padding left out."""
    return [
        row
        for b in batches
        for row, y in zip(b["input_ids"].tolist(), b["labels"].tolist(), strict=True)
        if max(y) >= 0
    ]


def texts(source: list[str], name: str = "some") -> None:
    def records(tokenizer, path, bad):
        return (Record(f"{i}", text, lambda text=text: (tokenizer.encode(text), None)) for i, text in enumerate(source))

    register_dataset(name, records)


@pytest.fixture(autouse=True)
def _names(monkeypatch):
    from fms import datasets

    monkeypatch.setattr(datasets, "_SOURCES", dict(datasets._SOURCES))


@settings(max_examples=40)
@given(st.data())
def test_resuming_at_any_step_equals_no_interruption(data):
    options = {"pack": data.draw(st.booleans()), "reset_attention": data.draw(st.booleans())}
    whole = [{k: v.tolist() for k, v in b.items()} for b in mock(**options).batches(3)]
    steps = data.draw(st.integers(0, len(whole)))
    first = mock(**options)
    begun = [{k: v.tolist() for k, v in b.items()} for b in islice(first.batches(3), steps)]
    state = json.loads(json.dumps(first.state_dict()))
    second = mock(**options)
    second.load_state_dict(state)
    rest = [{k: v.tolist() for k, v in b.items()} for b in second.batches(3)]
    assert begun + rest == whole


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_out_the_rows_of_one_rank(world, batch_size):
    alone = list(mock().batches(batch_size * world))
    ranks = [list(mock(rank=r, world=world).batches(batch_size)) for r in range(world)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole["input_ids"], torch.cat([part["input_ids"] for part in parts]))
        assert torch.equal(whole["labels"], torch.cat([part["labels"] for part in parts]))


def test_a_place_is_the_same_with_other_ranks_and_batch_sizes():
    first = mock()
    begun = list(islice(first.batches(6), 2))
    others = [mock(rank=r, world=2) for r in range(2)]
    for other in others:
        other.load_state_dict(first.state_dict())
    rest = zip(*(other.batches(2) for other in others), strict=True)
    assert ids(begun) + ids(b for pair in rest for b in pair) == ids(mock().batches(1))


def test_an_epoch_has_every_token_once_and_the_next_one_another_order():
    data = mock(epochs=1)
    tokens = Counter(t for b in data.batches(4) for t in b["labels"].flatten().tolist() if t != IGNORED)
    assert tokens == Counter(
        t for d, n in enumerate(data.corpus.lengths) for t in data.corpus.read(d, 0, n)[0].tolist()
    )
    rows = ids(mock().batches(1))
    half = len(rows) // 2
    assert half == data.rows
    assert rows[:half] == ids(mock(epochs=1).batches(1))
    assert not list(data.batches(1)), "it has ended"
    assert rows[:half] != rows[half:]
    assert ids(mock(seed=1).batches(1)) != rows
    assert ids(mock().batches(1)) == rows


def test_without_epochs_it_never_ends():
    assert len(list(islice(mock(epochs=None).batches(4), 100))) == 100


def test_the_state_is_that_of_the_batches_handed_out():
    data = mock()
    batches = data.batches(2)
    assert data.state_dict()["row"] == 0
    next(batches)
    assert data.state_dict()["row"] == 2
    batches.close()
    assert ids([next(data.batches(1))]) == ids(mock().batches(1))[2:3]


@pytest.mark.parametrize(
    ("changed", "words"), [({"seed": 3}, "seed=0"), ({"seq_len": 8}, "seq_len=16"), ({"documents": 20}, "documents=28")]
)
def test_a_place_in_other_data_is_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        mock(**changed).load_state_dict(mock().state_dict())


def test_a_place_in_the_same_amount_of_other_text_is_refused():
    texts(["abc", "def", "ghi"], "one")
    texts(["abc", "def", "xyz"], "other")
    state = get_dataset("one", TOKENIZER, held_out=0).state_dict()
    with pytest.raises(ValueError, match="content="):
        get_dataset("other", TOKENIZER, held_out=0).load_state_dict(state)


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=2, max_size=20), st.floats(0.01, 0.9))
def test_training_and_held_out_text_never_overlap(source, share):
    from fms.datasets import _SOURCES

    _SOURCES.pop("some", None)
    texts(source)
    sides = []
    for split in ("train", "held_out"):
        if split == "held_out" and len(set(source)) == 1:
            with pytest.raises(ValueError, match="nothing is held out"):
                get_dataset("some", TOKENIZER, split=split, held_out=share)
            return
        data = get_dataset(
            "some", TOKENIZER, split=split, held_out=share, epochs=1, pack=False, seq_len=4, shuffle=False
        )
        sides.append(
            ["".join(map(chr, (i for i in y if i >= 0))) for b in data.batches(1) for y in b["labels"].tolist()]
        )
    train, held_out = sides
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(source)


def test_held_out_batches_begin_anew_each_time_and_in_order():
    data = mock(split="held_out", held_out=0.5, epochs=None)
    first = ids(data.batches(2))
    assert ids(data.batches(2)) == first
    next(data.batches(1))
    assert ids(data.batches(2)) == first
    n = min(16, data.corpus.lengths[0])
    assert first[0][:n] == data.corpus.read(0, 0, n)[0].tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "split='test'"),
        ({"held_out": 1.0}, r"held_out=1.0 must lie in \[0, 1\)"),
        ({"rank": 2, "world": 2}, r"rank=2 must lie in \[0, 2\)"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"seed": -1}, "seed=-1"),
        ({"on_bad_record": "skipp"}, "did you mean 'skip'"),
        ({"phrases": 3}, "no option 'phrases' .did you mean 'phrase'"),
        ({"path": "x"}, "takes no path"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        mock(**options)


def test_names():
    with pytest.raises(ValueError, match="did you mean 'instruction'"):
        get_dataset("instructions", TOKENIZER)
    with pytest.raises(ValueError, match="dataset_path"):
        get_dataset("text", TOKENIZER)
    with pytest.raises(ValueError, match="there is a data set 'text' already"):
        register_dataset("text", lambda: [])
    texts(["a", "b"])
    assert list_datasets()[-1] == "some"
    with pytest.raises(ValueError, match="batch_size=0"):
        next(mock().batches(0))
