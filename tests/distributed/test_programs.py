"""Programs started by torchrun: they split the model by themselves, one speaks, and a failure ends all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(size: int, *command: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    return subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=280, cwd=ROOT)


@pytest.mark.slow
def test_smollm2_says_the_same_on_two_and_three_ranks(smollm2: Path) -> None:
    command = ["generate", "What is the capital of France?", "--model_path", str(smollm2), "--chat"]
    alone = subprocess.run([sys.executable, "-m", "fms", *command], capture_output=True, text=True, cwd=ROOT)
    assert "Paris" in alone.stdout
    for size in (2, 3):  # of 9 query and 3 key heads: with two ranks they are padded
        done = torchrun(size, "-m", "fms", *command)
        assert done.returncode == 0, done.stderr
        assert ("9 query and 3 key and value heads become 12 and 4" in done.stderr) == (size == 2)
        assert done.stdout == alone.stdout


@pytest.mark.slow
def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from fms.models import get_model\n"
        "model = get_model('llama', 'micro')\n"
        "if os.environ['RANK'] == '1':\n"
        "    raise RuntimeError('this rank has had enough')\n"
        "import torch\n"
        "model(torch.zeros(1, 4, dtype=torch.long))\n"
    )
    done = torchrun(2, str(program))
    assert done.returncode != 0
    first = next(line for line in done.stderr.splitlines() if "Traceback" in line)
    assert first.startswith("[rank1]")
    root = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1" in root
    assert "RuntimeError: this rank has had enough" in root


@pytest.mark.slow
def test_the_benchmark_runs_on_two_ranks(tmp_path: Path) -> None:
    checkpoint, rows_file = str(tmp_path / "checkpoint"), tmp_path / "rows.json"
    subprocess.run([sys.executable, "benchmarks/write_llama.py", checkpoint, "--tiny"], check=True, cwd=ROOT)
    options = ["--tiny", "--checkpoint", checkpoint, "--json", str(rows_file)]
    done = torchrun(2, "benchmarks/tensor_parallel.py", *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads(rows_file.read_text())
    assert [row for row in rows if "error" in row or "skipped" in row] == []
    assert [value for row in rows for key, value in row.items() if key.endswith("_ms") and isinstance(value, str)] == []
    assert [row["equal"] for row in rows if "equal" in row] == [True] * 2
    assert {tuple(row["a_step"]["all_reduce"]) for row in rows if "a_step" in row} == {(5, 5 * 2 * 256 * 2)}
    assert [row.get("what") for row in rows].count("load") == 2
