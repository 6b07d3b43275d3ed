"""Text files and what is wrong with some of them (each fault: file:line, or passed over and counted)."""

import json

import pytest

from fms.datasets import BadRecordError, get_dataset, records
from fms.datasets.text import pieces
from fms.training.loss import IGNORED
from fms.utils.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer()
BOS, EOS = "\x02", "\x03"


def documents(data) -> list[str]:
    return [TOKENIZER.decode(data.corpus.read(d, 0, n)[0], False) for d, n in enumerate(data.corpus.lengths)]


def read(path, **options) -> list[str]:
    return documents(get_dataset("text", TOKENIZER, path, held_out=0, **options))


def test_a_folder_gives_a_document_a_file(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nfile")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "code.py").write_text("pass")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "more": 1}')
    assert read(tmp_path) == [f"{BOS}{t}{EOS}" for t in ("first", "second\nfile", "third", "fourth")]
    assert read(tmp_path, pattern="*.py") == [f"{BOS}pass{EOS}"]
    assert read([tmp_path / "in" / "c.jsonl", tmp_path / "a.md"])[-1] == f"{BOS}first{EOS}"
    with pytest.raises(ValueError, match=r"no file that fits \*\.rst"):
        read(tmp_path, pattern="*.rst")
    with pytest.raises(ValueError, match=r"no such file or folder \(did you mean 'a\.md'\?\)"):
        read(tmp_path / "a.mdd")


def test_a_lone_file_is_cut_at_empty_lines_and_only_its_end_is_an_end(tmp_path):
    file = tmp_path / "play.txt"
    file.write_text("\n\n".join(f"{n}: " + "word " * 1000 for n in range(20)))
    found = read(file)
    assert len(found) > 2
    assert "".join(text.removeprefix(BOS) for text in found) == file.read_text() + EOS
    assert all(text.endswith("\n\n") for text in found[:-1])


@pytest.mark.parametrize("text", ["a" * 100, "a b " * 30, "a\n" * 50, "a\n\nb c\n" * 14, ""])
def test_pieces_make_up_the_text(text):
    parts = list(pieces(text, 10))
    assert "".join(part for part, _ in parts) == text
    assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True] * bool(parts)
    assert all(10 <= len(part) <= 25 for part, _ in parts)


GOOD = b'{"text": "good"}\n'
FAULTS = {
    "half a line": (b'{"text": "ha', "not JSON"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    "missing field": (b'{"txt": "x"}', "no field 'text' .did you mean 'txt'"),
    "a number": (b'{"text": 3}', "must be a text, this is a number"),
    "empty text": (b'{"text": " "}', "the field 'text' is empty"),
    "no object": (b'["text"]', "an object is required|object is required, this is an array"),
    "deep": (b"[" * 100_000, "nested too deep"),
    "10 MB": (b'{"text": "' + b"x" * 10_000_000 + b'"}', "a line of 10.0 MB"),
    "lone surrogate": (b'{"text": "\\ud800"}', "surrogate"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_is_named_or_passed_over(fault, tmp_path, caplog):
    line, words = FAULTS[fault]
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD + line + b"\n" + GOOD)
    tokenizer = Strict()
    with pytest.raises(BadRecordError, match=rf"data\.jsonl:2: .*({words})"):
        get_dataset("text", tokenizer, file, held_out=0)
    data = get_dataset("text", tokenizer, file, held_out=0, on_bad_record="skip")
    assert documents(data) == [f"{BOS}good{EOS}"] * 2
    assert data.bad_records == 1
    assert f"bad records passed over: 1, the first is {file}:2: " in caplog.text


class Strict(CharTokenizer):
    """Refuses what is no character, as tokenizers with a vocabulary do."""

    def encode(self, text, add_special_tokens=False):
        text.encode()
        return super().encode(text, add_special_tokens)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a.txt: the file is empty"),
        (b" \n", "a.txt: .*white space"),
        (b"fine\n\xffx\n", "a.txt:2: not UTF-8 at byte 1"),
    ],
)
def test_a_bad_text_file(content, words, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("good")
    with pytest.raises(BadRecordError, match=words):
        read(tmp_path)
    assert read(tmp_path, on_bad_record="skip") == [f"{BOS}fine\n{EOS}"] * (b"fine" in content) + [f"{BOS}good{EOS}"]
    if b"fine" not in content:
        with pytest.raises(ValueError, match=r"no document is left for 'train' \(1 bad records\)"):
            read(tmp_path / "a.txt", on_bad_record="skip")


def test_a_file_of_a_json_array(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"text": "one"}, {"no": 1}, 3], indent=1))
    with pytest.raises(BadRecordError, match=r"data\.json: record 2: there is no field 'text'"):
        read(file)
    assert read(file, on_bad_record="skip") == [f"{BOS}one{EOS}"]
    file.write_text('[{"text": "one"},\n {"text": ]')
    with pytest.raises(BadRecordError, match=r"data\.json:2: not JSON"):
        read(file)
    file.write_bytes(b'[{"text":\n "\xff"}]')
    with pytest.raises(BadRecordError, match=r"data\.json:2: not UTF-8"):
        read(file)
    file.write_text('{"text": "really lines"}\n')
    assert read(file) == [f"{BOS}really lines{EOS}"]


def test_a_line_of_the_greatest_length_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 20)
    file = tmp_path / "x.txt"
    file.write_text("x" * 19 + "\n" + "y" * 20 + "\n")
    with pytest.raises(BadRecordError, match=r"x\.txt:2"):
        read(file)
    file.write_text("x" * 19 + "\n" + "y" * 20)
    assert read(file) == [BOS + file.read_text() + EOS]


def test_batches_of_real_text(tmp_path):
    """Source files of the standard library: what training sees is what they say."""
    import json as package
    from pathlib import Path

    folder = Path(package.__file__).parent
    data = get_dataset("text", TOKENIZER, folder, pattern="*.py", seq_len=128, epochs=1, held_out=0.3)
    held = get_dataset("text", TOKENIZER, folder, pattern="*.py", seq_len=128, split="held_out", held_out=0.3)
    sides = [data.corpus.lengths.sum(), held.corpus.lengths.sum()]
    sizes = [len(file.read_text(encoding="utf-8")) + 2 for file in folder.glob("*.py")]
    assert sum(sides) == sum(sizes)
    for batch in data.batches(4):
        assert batch["input_ids"].shape == (4, 128)
        counts = batch["labels"] != IGNORED
        assert (batch["labels"] == batch["input_ids"])[counts].all()
