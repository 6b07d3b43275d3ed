"""What torchrun's users see when ranks die, hang or start again, and when there are several machines or many ranks."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\nimport torch.distributed as dist\n"
HEAD += "from fms.distributed.launch import launch\nrank = int(os.environ['RANK'])\n"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


def started(program: Path, text: str, *options: str) -> subprocess.Popen:
    program.write_text(HEAD + text)
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(program)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )


def alone(size: int) -> tuple[str, ...]:
    return "--standalone", f"--nproc-per-node={size}"


def assert_none_is_left(directory: Path) -> None:
    """Each rank wrote its process id."""
    pids = [int(file.read_text()) for file in directory.glob("pid*")]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    text = f"open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))\n"
    text += "launch('cpu')\nx = torch.ones(4)\ndist.all_reduce(x)\n"
    text += "if rank == 1: os._exit(7)\ndist.all_reduce(x)\n"
    start = time.monotonic()
    process = started(tmp_path / "program.py", text, *alone(3))
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    assert "local_rank: 1" in said or "rank      : 1" in said, said
    assert_none_is_left(tmp_path)


def test_a_rank_that_hangs_ends_all(tmp_path: Path) -> None:
    text = f"open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))\n"
    text += "launch('cpu', timeout=5)\nx = torch.ones(4)\ndist.all_reduce(x)\n"
    text += "if rank == 1: time.sleep(600)\ndist.all_reduce(x)\n"
    start = time.monotonic()
    process = started(tmp_path / "program.py", text, *alone(2))
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    assert "5000ms" in said or "imed out" in said, said
    assert_none_is_left(tmp_path)


def test_the_second_attempt_succeeds(tmp_path: Path) -> None:
    text = "launch('cpu', timeout=20)\nx = torch.ones(4)\ndist.all_reduce(x)\n"
    text += "attempt = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
    text += "if rank == 1 and attempt == '0': raise RuntimeError('once only')\ndist.all_reduce(x)\n"
    text += "print(f'attempt {attempt} rank {rank} has {x[0]:.0f}', flush=True)\n"
    process = started(tmp_path / "program.py", text, *alone(2), "--max-restarts=2")
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "once only" in said
    assert all(f"attempt 1 rank {rank} has 4" in out for rank in (0, 1)), out  # lines of two processes may run together


THIN = "{'src_vocab_size': 103, 'emb_dim': 128, 'nheads': 64, 'kvheads': 8, 'head_dim': 4, 'hidden_dim': 96,"
THIN += " 'nlayers': 2, 'max_expected_seq_len': 64, 'pad_id': None}"
COMPARE = f"""
from fms.models import freeze, get_model
from fms.utils.generation import generate
def made(**kwargs):
    torch.manual_seed(0)
    model = get_model('llama', 'micro', **kwargs, **{THIN})
    with torch.no_grad():
        for p in model.parameters():
            getattr(p, '_local_tensor', p).mul_(8)
    return model.double()
def compare(group):
    ids = torch.randint(2, 103, (2, 9), generator=torch.Generator().manual_seed(1))
    one, many = made(distributed_strategy='none'), made(distributed_strategy='tp', group=group)
    for frozen in (False, True):
        if frozen: freeze(one), freeze(many)
        with torch.no_grad():
            torch.testing.assert_close(many(ids), one(ids), rtol=1e-9, atol=1e-9)
            assert torch.equal(generate(many, ids, max_new_tokens=8), generate(one, ids, max_new_tokens=8))
    print(f'rank {{rank}} agrees', flush=True)
"""


def test_seventy_billions_heads_on_eight_ranks(tmp_path: Path) -> None:
    process = started(tmp_path / "program.py", COMPARE + "launch('cpu')\ncompare(None)\n", *alone(8))
    out, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert out.count("agrees") == 8


def test_two_machines_hold_a_model_each_and_train_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    text = COMPARE + (
        "launch('cpu')\n"
        "from fms.distributed.mesh import data_place, make_mesh\n"
        "from tests.distributed.test_fsdp import TIED, trained\n"
        "mesh = make_mesh('cpu', tp=2)\n"
        "assert mesh.get_local_rank('tp') == int(os.environ['LOCAL_RANK'])\n"
        "assert data_place(mesh) == (int(os.environ['GROUP_RANK']), 2)\n"
        "compare(mesh['tp'])\n"
        "many, one = trained(mesh, TIED, 'tp x fsdp'), trained(None, TIED)\n"
        "torch.testing.assert_close(many[0], one[0], rtol=1e-7, atol=0)\n"
        "print(f'rank {rank} trains', flush=True)\n"
    )
    options = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--nnodes=2", "--nproc-per-node=2"]
    options += ["--rdzv-id=two", "--local-addr=127.0.0.1"]
    agents = [started(tmp_path / f"program{i}.py", text, *options) for i in range(2)]
    for agent in agents:
        out, said = agent.communicate(timeout=200)
        assert agent.returncode == 0, said
        assert out.count("agrees") == out.count("trains") == 2
