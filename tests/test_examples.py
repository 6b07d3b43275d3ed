"""The examples run, on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_chat

from fms.models import registry
from fms.utils.serialization import sources

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(example), str(write_tiny_chat(tmp_path))])
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))  # what an example registers goes again
    monkeypatch.setattr(sources, "_SOURCES", dict(sources._SOURCES))
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
