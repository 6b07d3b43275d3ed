"""Shards of tokens: what `fms tokenize` writes trains as the text does."""

import pytest

from fms.cli import main
from fms.datasets import BadRecordError, get_dataset
from fms.utils.tokenizers import CharTokenizer

pa = pytest.importorskip("pyarrow")
TOKENIZER = CharTokenizer()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    for n in range(12):
        (tmp_path / "text" / f"{n:02}.txt").write_text(f"document {n} " * (n + 1))
    (tmp_path / "text" / "more.jsonl").write_text("".join(f'{{"body": "line {n}"}}\n' for n in range(20)))
    return tmp_path / "text"


def tokenize(folder, out, *more) -> int:
    words = ["tokenize", str(folder), str(out), "--tokenizer", "char_tokenizer", "--field", "body", *more]
    return main(words)


def test_shards_are_the_text(folder, tmp_path, capsys):
    out = tmp_path / "shards"
    assert tokenize(folder, out, "--shard_tokens", "400") == 0
    assert capsys.readouterr().out == f"{out}: 1.07 ktokens of 32 documents in 3 shards\n"
    assert sorted(file.name for file in out.iterdir()) == ["00000.arrow", "00001.arrow", "00002.arrow"]
    for split in ("train", "held_out"):
        options = {"seq_len": 32, "split": split, "epochs": 1, "held_out": 0.3}
        shards = get_dataset("arrow", TOKENIZER, out, **options)
        text = get_dataset("text", TOKENIZER, folder, field="body", **options)
        assert shards.state_dict() == text.state_dict()
        for a, b in zip(shards.batches(2), text.batches(2), strict=True):
            assert all((a[name] == b[name]).all() for name in ("input_ids", "labels"))


def test_what_stands_there_is_kept_and_a_failure_leaves_nothing(folder, tmp_path, capsys):
    out = tmp_path / "shards"
    assert tokenize(folder, out) == 0
    before = (out / "00000.arrow").read_bytes()
    assert tokenize(folder, out) == 2
    assert "not empty" in capsys.readouterr().err
    (folder / "bad.jsonl").write_text('{"body": ')
    assert tokenize(folder, out, "--overwrite") == 2
    assert "bad.jsonl:1: not JSON" in capsys.readouterr().err
    assert (out / "00000.arrow").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["shards", "text"]
    assert tokenize(folder, out, "--overwrite", "--on_bad_record", "skip") == 0
    assert "passed over: 1, the first is" in capsys.readouterr().err
    assert (out / "00000.arrow").read_bytes() == before


def test_text_without_a_document_makes_no_shards(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("")
    assert tokenize(tmp_path / "x.txt", tmp_path / "out", "--on_bad_record", "skip") == 2
    assert "there is no document (1 bad records)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def write(file, column, name="tokens", metadata=None):
    schema = pa.schema([(name, column.type)], metadata=metadata)
    with pa.ipc.new_file(str(file), schema) as out:
        for part in (column.slice(0, 2), column.slice(2)):
            out.write_batch(pa.record_batch([part], schema=schema))


@pytest.mark.parametrize("kind", [pa.list_(pa.uint32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())])
def test_shards_of_others(kind, tmp_path):
    lists = [[1, 2, 3], [], [4], [5, 6], [7]]
    write(tmp_path / "a.arrow", pa.array(lists, kind), "ids")
    options = {"seq_len": 3, "pack": False, "epochs": 1, "shuffle": False}
    data = get_dataset("arrow", TOKENIZER, tmp_path, column="ids", held_out=0, **options)
    assert [[i for i in b["labels"][0].tolist() if i >= 0] for b in data.batches(1)] == [[1, 2, 3], [4], [5, 6], [7]]
    aside = get_dataset("arrow", TOKENIZER, tmp_path, column="ids", held_out=0.5, split="held_out", **options)
    kept = get_dataset("arrow", TOKENIZER, tmp_path, column="ids", held_out=0.5, **options)
    assert (aside.documents, kept.documents) == (2, 2)
    assert not set(aside.corpus.keys) & set(kept.corpus.keys)


def test_what_is_no_shard_is_named(tmp_path):
    file = tmp_path / "a.arrow"
    for column, words in ((pa.array([1, 2]), "must hold lists"), (pa.array([["a"]]), "must hold lists of integers")):
        write(file, column)
        with pytest.raises(ValueError, match=rf"a\.arrow: the column 'tokens' {words}"):
            get_dataset("arrow", TOKENIZER, file)
    write(file, pa.array([[1]]), "input_ids")
    with pytest.raises(ValueError, match="no column 'tokens'; there are input_ids"):
        get_dataset("arrow", TOKENIZER, file)
    write(file, pa.array([[1]]), metadata={"fms": '{"vocab_size": 99, "tokenizer": "other"}'})
    with pytest.raises(ValueError, match="made with other of 99 ids; the tokenizer given has 256"):
        get_dataset("arrow", TOKENIZER, file)
    write(file, pa.array([[1, 256]]))
    with pytest.raises(ValueError, match="the id 256 is not one of the tokenizer's 256"):
        next(get_dataset("arrow", TOKENIZER, file).batches(1))
    write(file, pa.array([[1, -1]]))
    with pytest.raises(ValueError, match="the id -1 is not"):
        next(get_dataset("arrow", TOKENIZER, file).batches(1))


def test_a_shard_cut_short_is_a_bad_record(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.arrow", pa.array([[1, 2]] * 50))
    file = tmp_path / "b.arrow"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(BadRecordError, match=r"b\.arrow: not an Arrow file that is whole"):
        get_dataset("arrow", TOKENIZER, tmp_path)
    assert get_dataset("arrow", TOKENIZER, tmp_path, on_bad_record="skip").documents == 50
