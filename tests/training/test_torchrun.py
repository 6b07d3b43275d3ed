"""`fms train` under torchrun: the existing script's command line, and two machines."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fms.training.metrics import read_rows
from tests.tiny import LINES, write_tiny_chat

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
pytestmark = pytest.mark.slow


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, cwd=ROOT, env=env)


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_rows(output) if "loss" in row]


def test_the_existing_command_line(tmp_path: Path) -> None:
    """Weights of Meta and their tokenizer, no data named: the Alpaca file, here one in the cache."""
    mistral_common = pytest.importorskip("mistral_common")
    from fms.models import get_model
    from fms.models.convert import save_model

    shape = {"emb_dim": 32, "nheads": 4, "kvheads": 4, "head_dim": 8, "nlayers": 2, "hidden_dim": 256}
    save_model(get_model("llama", "2-7b", **shape), tmp_path / "7B", "meta")
    tokenizer = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    examples = [{"instruction": f"Add {n} and one.", "input": "", "output": f"{n + 1}"} for n in range(50)]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "alpaca_data.json").write_text(json.dumps(examples))
    flags = f"--architecture=llama --tokenizer={tokenizer} --model_path={tmp_path}/7B --report_steps=1 "
    flags += f"--checkpoint_format=meta --distributed=fsdp --device_type=cpu --output_path={tmp_path}/out"
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "scripts/train_causal.py", *flags.split()]
    done = run(*command, FMS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 2  # one of each epoch
    command[4] = "--nproc_per_node=1"
    one = run(*command, "--steps=5", FMS_CACHE=str(tmp_path / "cache"))
    assert one.returncode == 0, one.stderr
    assert "there is nothing to share out, distributed='fsdp' has no effect" in one.stderr


def test_compiled_blocks_and_fsdp(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{line} {n}"}) + "\n" for n in range(30) for line in LINES))
    plain = ["fms", "train", "--model_path", write_tiny_chat(tmp_path / "model"), "--dataset_path", text]
    plain += ["--seq_len", 16, "--device_type", "cpu", "--steps", 4, "--report_steps", 1, "--lr", "1e-2"]
    one = run(sys.executable, "-m", *plain, "--batch_size", 4, "--output", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    more = ["--batch_size", 2, "--output", tmp_path / "two", "--distributed", "fsdp", "--compile", "blocks"]
    two = run(*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", *plain, *more)
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_sigterm_to_a_job_saves_and_goes_on(tmp_path: Path) -> None:
    """As Slurm sends it: to torchrun and to its processes, to which torchrun passes it on."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(LINES) * 40)
    plain = ["-m", "fms", "train", "--model_path", write_tiny_chat(tmp_path / "model"), "--dataset_path", text]
    plain += ["--seq_len", 16, "--device_type", "cpu", "--report_steps", 1, "--distributed", "ddp"]
    plain += ["--output", tmp_path / "out", "--held_out", 0]
    command = [*map(str, [*TORCHRUN, "--standalone", "--nproc_per_node=2", *plain])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    assert job.stderr is not None
    while not job.stderr.readline().startswith("step 3:"):
        assert job.poll() is None
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for pid in (job.pid, *map(int, children)):
        os.kill(pid, signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode != 0
    last = losses(tmp_path / "out")
    done = run(*command, "--steps", len(last) + 1)
    assert done.returncode == 0, done.stderr
    assert f"goes on from {tmp_path}/out/step_{len(last):08} at step {len(last)}" in done.stderr
    assert losses(tmp_path / "out")[:-1] == last


def test_two_machines_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{line} {n}"}) + "\n" for n in range(30) for line in LINES))
    plain = ["--model_path", write_tiny_chat(tmp_path / "model"), "--dataset_path", text, "--seq_len", 16]
    plain += ["--device_type", "cpu", "--steps", 6, "--report_steps", 1, "--lr", "1e-2"]
    one = run(sys.executable, "-m", "fms", "train", *plain, "--batch_size", 4, "--output", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    options = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--nnodes=2", "--nproc-per-node=2"]
    options += ["--rdzv-id=two", "--local-addr=127.0.0.1"]
    many = ["-m", "fms", "train", *plain, "--batch_size", 1, "--output", tmp_path / "two", "--distributed", "hsdp"]
    command = [*map(str, [*TORCHRUN, *options, *many])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env) for _ in range(2)]
    for agent in agents:
        _, said = agent.communicate(timeout=280)
        assert agent.returncode == 0, said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
