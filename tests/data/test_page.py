"""The code of docs/datasets.md runs."""

from pathlib import Path

from test_docs import blocks

from fms import datasets


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "_SOURCES", dict(datasets._SOURCES))
    page = Path(__file__).parents[2] / "docs/datasets.md"
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec"), {"__name__": "__main__"})
