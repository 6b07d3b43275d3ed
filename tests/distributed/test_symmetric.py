"""The kernels of symmetric memory, between two processes that share one GPU: slow, but the same sums."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
import torch.distributed as dist
from fms.distributed.communicator import Communicator
from fms.models import freeze, get_model
from fms.utils.generation import generate

dist.init_process_group("gloo")
rank = dist.get_rank()
with torch.inference_mode():  # what is made so must be of use outside of it
    comm = Communicator(dist.group.WORLD, "cuda")
assert Communicator(dist.group.WORLD, "cuda").symmetric is comm.symmetric
for dtype in (torch.bfloat16, torch.float32):
    for n in (8, 4096, 200_000, 1_000_000, 8_000_000):
        x = (torch.arange(n, device="cuda") % 7).to(dtype)
        assert torch.equal(comm.sum(x * (rank + 1)), x * 3), (dtype, n)
assert comm.counts["all_reduce by symm_mem"][0] == 9, comm.counts  # all but the last

sums = []
for i in range(45):  # one after the other by the same memory, now one rank late, now the other
    if (i + rank) % 4 == 0:
        torch.cuda._sleep(3_000_000)
    dtype, n = (torch.bfloat16, torch.float32)[i % 2], (8, 4096, 300_000)[i % 3]
    sums.append(comm.sum(torch.full((n,), i + rank, dtype=dtype, device="cuda")))
for i, y in enumerate(sums):
    assert (y == 2 * i + 1).all(), (i, y)

x = torch.zeros(2, 4096, dtype=torch.bfloat16, device="cuda")
comm.sum(x.clone())
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    y = comm.sum(comm.sum(comm.sum(x + rank) / 2) / 2)
for i in range(5):
    x.fill_(i)
    graph.replay()
    assert (y == 2 * i + 1).all(), (i, y)

fields = dict(src_vocab_size=1000, emb_dim=256, nheads=8, kvheads=4, head_dim=32, nlayers=2, max_expected_seq_len=64)
models = []
for strategy in ("none", "tp"):
    torch.manual_seed(0)
    models.append(freeze(get_model("llama", "micro", device_type="cuda", distributed_strategy=strategy, **fields)))
ids = torch.arange(20, device="cuda").view(2, 10)
one, many = (generate(model, ids, max_new_tokens=5) for model in models)
assert torch.equal(one, many)
assert models[1].comm.counts["all_reduce by symm_mem"][0] > 0, models[1].comm.counts
print("all is well")
"""


@pytest.mark.gpu
def test_two_processes_sum_by_symmetric_memory() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    environment |= {"FMS_COMMUNICATOR": "symm_mem", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment | {"RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
        assert "all is well" in text
