"""The examples run, on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest

from fms.models import registry
from fms.utils.serialization import sources
from tests.tiny import write_tiny_chat

APART = ["question_answering"]  # tests/models/test_hf_encoders.py has the model for it
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
EXAMPLES = [path for path in EXAMPLES if path.stem not in APART]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(example), str(write_tiny_chat(tmp_path))])
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))  # what an example registers goes again
    monkeypatch.setattr(sources, "_SOURCES", dict(sources._SOURCES))
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
