"""docs/hugging_face.md: every test that a table names exists, and the example runs."""

import ast
import re
import warnings
from pathlib import Path

import pytest

from tests.tiny import write_tiny_chat

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/hugging_face.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)


def test_every_row_is_held_by_a_test():
    rows = [row for row in re.findall(r"^\| .* \|$", PAGE, re.MULTILINE) if "test" in row and "::" in row]
    assert len(rows) == len(NAMED) > 15
    for file, name in NAMED:
        (found,) = ROOT.glob(f"tests/**/{file}")
        functions = [node.name for node in ast.parse(found.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert name in functions, f"{file} has no {name}"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    write_tiny_chat(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "docs/hugging_face.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The quick brown fox")


def test_nothing_outside_the_adapters_imports_transformers():
    files = [file for file in ROOT.glob("fms/**/*.py") if "models/hf/" not in file.as_posix()]
    found = [
        file.name for file in files if re.search(r"^\s*(from|import) transformers", file.read_text(), re.MULTILINE)
    ]
    assert files
    assert not found


def test_the_adapters_stay_small():
    lines = sum(len(file.read_text().splitlines()) for file in ROOT.glob("fms/models/hf/*.py"))
    assert 100 < lines <= 600
