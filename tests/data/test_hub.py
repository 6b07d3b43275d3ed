"""Data sets of the Hub's own library, from a folder: no Hub is there."""

import pytest

from fms.datasets import BadRecordError, get_dataset
from fms.utils.tokenizers import CharTokenizer

datasets = pytest.importorskip("datasets", minversion="2.0")  # this folder has the same name, and no version
TOKENIZER = CharTokenizer()


def saved(tmp_path, columns):
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def test_text(tmp_path):
    path = saved(tmp_path, {"body": ["one", "two", ""]})
    with pytest.raises(BadRecordError, match="record 3: the field 'body' is empty"):
        get_dataset("huggingface", TOKENIZER, path, field="body")
    data = get_dataset("huggingface", TOKENIZER, path, field="body", held_out=0, on_bad_record="skip")
    assert (data.documents, data.tokens, data.bad_records) == (2, 10, 1)


def test_examples_to_answer_and_splits(tmp_path):
    answers = datasets.Dataset.from_dict({"instruction": ["a", "b"], "output": ["c", "d"]})
    datasets.DatasetDict({"tune": answers}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="no split 'train'; there are tune"):
        get_dataset("huggingface", TOKENIZER, tmp_path / "data")
    data = get_dataset("huggingface", TOKENIZER, tmp_path / "data", part="tune", held_out=0)
    assert data.corpus.counted
    assert data.documents == 2
