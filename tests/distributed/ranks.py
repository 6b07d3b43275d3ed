"""Real ranks for the tests: processes with gloo groups of several sizes, started once, which run functions by name."""

import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST = 4


class Ranks:
    """A pool of `MOST` ranks: `run(size, function, ...)` calls `function(mesh, ...)` on the first `size` of them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size: int, function: Callable, *args: Any) -> list[Any]:
        """What each rank's call gave, or the first failure as an `AssertionError` with its traceback."""
        for pipe in self.pipes[:size]:
            pipe.send((size, function.__module__, function.__name__, args))
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            assert pipe.poll(120), f"rank {rank} of {size} does not answer"
            results.append(pipe.recv())
        for rank, (ok, value) in enumerate(results):
            assert ok, f"rank {rank} of {size}:\n{value}"
        return [value for _, value in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def serve(rank: int, port: int, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, MOST, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=MOST, timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST + 1)}
    meshes = {
        size: DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
        for size, group in groups.items()
        if rank < size
    }
    while True:
        size, module, name, args = pipe.recv()
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(meshes[size], *args)))
        except BaseException:  # whatever it is, the test tells
            pipe.send((False, traceback.format_exc()))
