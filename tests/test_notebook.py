"""The notebooks run, and say what they say: `python -m tests.test_notebook` runs them and keeps their outputs anew."""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run_cell(source: str, names: dict[str, Any]) -> str:
    """What a cell prints, and its last line's value where it has one."""
    tree, shown = ast.parse(source), io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(shown):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if value is not None:
                print(repr(value))
    return shown.getvalue()


def executed(notebook: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Its code cells, each with what it shows now."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [(cell, run_cell("".join(cell["source"]), names)) for cell in cells]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook(file, smollm2, monkeypatch):
    import torch

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: plain(module, backend="eager"))  # without minutes of C++
    monkeypatch.syspath_prepend(str(ROOT))
    notebook = json.loads(file.read_text())
    for number, (cell, shown) in enumerate(executed(notebook), 1):
        if "seconds" not in cell["metadata"].get("tags", []):
            kept = "".join(line for output in cell["outputs"] for line in output["text"])
            assert shown == kept, f"cell {number}"


def write() -> None:
    sys.path.insert(0, str(ROOT))
    for file in NOTEBOOKS:
        notebook = json.loads(file.read_text())
        for number, (cell, shown) in enumerate(executed(notebook), 1):
            lines = shown.splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
            cell["execution_count"] = number
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
