"""`fms embed` as a user meets it: vectors, tables, standard input, errors."""

import io
import json
from pathlib import Path

import pytest

from fms.cli import main
from tests.tiny import write_tiny_chat


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder that takes the last token's state, of length 1."""
    directory = write_tiny_chat(tmp_path_factory.mktemp("model") / "tiny")
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    (directory / "modules.json").write_text(json.dumps([{"type": f"models.{k}", "path": p} for k, p in kinds]))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    prompts = {"prompts": {"query": "What is "}}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return str(directory)


def numbers(line: str) -> list[float]:
    return [float(word) for word in line.split()]


def test_a_vector_a_line(model: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["embed", "Paris.", "The dog.", "--model_path", model]) == 0
    first, second = map(numbers, capsys.readouterr().out.splitlines())
    assert len(first) == len(second) == 32
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-5)
    assert main(["embed", "The dog.", "Paris.", "--json", "--batch_size", "1", "--model_path", model]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["The dog.", "Paris."]
    assert lines[0]["vector"] == pytest.approx(second, abs=1e-5)
    assert lines[1]["vector"] == pytest.approx(first, abs=1e-5)
    assert all(line["tokens"] > 0 for line in lines)


def test_how_alike_texts_are(model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Paris.\n\nThe dog.\nParis.\n"))
    assert main(["embed", "-", "--similarity", "--model_path", model]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["1", "2", "3"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert [row.split()[1] == "1.0000" for row in rows] == [True, False, True]
    assert [row.split(maxsplit=4)[4] for row in rows] == ["Paris.", "The dog.", "Paris."]
    assert main(["embed", "Paris.", "The dog.", "--similarity", "--json", "--model_path", model]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["texts"] == ["Paris.", "The dog."]
    assert table["similarity"][0][1] == pytest.approx(float(rows[0].split()[2]), abs=1e-4)


def test_prompts(model: str, capsys: pytest.CaptureFixture) -> None:
    lines = []
    for words in (["Paris", "--prompt_name", "query"], ["What is Paris"], ["Paris"]):
        assert main(["embed", *words, "--model_path", model]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] != lines[2]


@pytest.mark.parametrize("to", ["hf", "own"])
def test_a_converted_directory_gives_the_same(
    to: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", model, str(tmp_path / "new"), "--to", to]) == 0
    capsys.readouterr()
    lines = []
    for path in (model, str(tmp_path / "new")):
        assert main(["embed", "Paris", "--prompt_name", "query", "--model_path", path]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--prompt_name", "qery"], "prompt 'qery' is not known (did you mean 'query'?); known are query"),
        (["-"], "standard input has no text"),
        (["x", "--batch_size", "0"], "'0' must be a whole number, at least 1"),
    ],
)
def test_errors_are_one_line(
    words: list, message: str, model: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    try:
        code = main(["embed", *words, "--model_path", model])
    except SystemExit as error:
        code = error.code
    found = capsys.readouterr()
    assert code == 2
    assert not found.out
    assert found.err.startswith("fms: error: ")
    assert message in found.err
    assert found.err.count("\n") == 1


def test_an_encoder_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from fms.models import get_model
    from fms.models.convert import save_model

    tiny = write_tiny_chat(tmp_path / "tiny")
    shape = {"src_vocab_size": 320, "emb_dim": 8, "nheads": 2, "nlayers": 1, "hidden_dim": 8}
    save_model(get_model("bert", **shape), tmp_path / "bert", "hf")
    words = ["--model_path", str(tmp_path / "bert"), "--tokenizer", str(tiny)]
    assert main(["generate", "Paris", *words]) == 2
    assert "an encoder can't generate text" in capsys.readouterr().err
    assert main(["embed", "Paris", *words]) == 0
