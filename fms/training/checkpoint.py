"""Checkpoints of a run: by torch's DCP, beside the run, whole or not there at all, and read on any mesh."""

import fcntl
import json
import logging
import os
import random
import re
import shutil
import socket
import warnings
from base64 import b64decode, b64encode
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fms.training.pickles import SafeReader
from fms.training.ranks import agreed, rank
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.writers import verify_manifest, write_manifest

log = logging.getLogger(__name__)
State = dict[str, Any]
WRITING = ".writing"


class Checkpoints:
    """Those of one output directory, `step_N` each; the last `keep` of them stay.

    `save` copies the state to the CPU and writes it in a thread, on all ranks, under another name; when all of it is on
    disk it gets its own. One that has its name is whole. Raises `ValueError` if another run has the directory.
    """

    def __init__(self, output: str | Path, keep: int = 2):
        self.output, self.keep = Path(output).expanduser().absolute(), keep
        lock = agreed(lambda: _own(self.output))
        self._lock = lock if rank() == 0 else None
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, the oldest first."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.output.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.output / f"step_{step:08}"

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, shared: State, own: State) -> None:
        """`shared` is the same on all ranks, `own` this rank's: plain values, as JSON has them."""
        self.wait()
        aside = self.path(step).with_suffix(WRITING)

        def begin() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            (aside / "state.json").write_text(json.dumps(shared | {"step": step}))

        agreed(begin)
        (aside / f"rank_{rank():05}.json").write_text(json.dumps(own))
        state = {name: _copied(tensor) for name, tensor in tensors(model, optimizer).items()}
        self._pending = self._pool.submit(self._write, state, aside, self.path(step))

    def wait(self) -> None:
        """Until what is being written is on disk. Raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _write(self, state: dict[str, Tensor], aside: Path, target: Path) -> None:
        _quiet()
        dcp.save(state, storage_writer=dcp.FileSystemWriter(aside), process_group=self._group)
        if rank():  # the first rank has heard by now that all files are there
            return
        write_manifest(aside)
        for path in (*aside.iterdir(), aside):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)  # damaged, or it would have been resumed from
        aside.rename(target)
        _sync(self.output)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def last_good(self) -> Path | None:
        """The newest checkpoint whose files are as its manifest has them; what is passed over is logged."""

        def look() -> Path | None:
            for step in reversed(self.steps()):
                problems = verify_manifest(self.path(step))
                if not problems:
                    return self.path(step)
                log.warning("%s is passed over: %s", self.path(step).name, problems[0])
            return None

        return agreed(look)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[State, State | None]:
    """Read a checkpoint into a model and its optimizer, however many ranks wrote it. Returns what all ranks shared, and
    what this rank had if there were as many. Raises `CheckpointError` in one line."""
    state = tensors(model, optimizer)
    reader = SafeReader(path)
    known = reader.read_metadata().state_dict_metadata
    for name, tensor in state.items():
        there = known.get(name)
        if there is None or tuple(there.size) != tuple(tensor.shape):  # type: ignore[union-attr]
            size = "nothing" if there is None else f"shape {list(there.size)}"  # type: ignore[union-attr]
            raise CheckpointError(f"{path}: has {size} for {name}, the run needs {list(tensor.shape)}")
    _quiet()
    try:
        dcp.load(state, storage_reader=reader)
    except dcp.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path}: can't be read: {type(first).__name__}: {first}") from None
    shared = json.loads((path / "state.json").read_text())
    own = path / f"rank_{rank():05}.json"
    same = shared["world"] == (dist.get_world_size() if dist.is_initialized() else 1)
    return shared, json.loads(own.read_text()) if same else None


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds: each trained parameter and its optimizer state by name. A tied one is there once."""
    named = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    states = dict(optimizer.state)  # where what is missing is an error
    state = {f"{kind}.{name}": value for name, p in named.items() for kind, value in states[p].items()}
    return {name: p.detach() for name, p in named.items()} | state


def random_state() -> State:
    """Of this process's generators, as JSON holds it."""
    state: State = {"torch": _text(torch.get_rng_state()), "python": random.getstate()}
    if torch.cuda.is_initialized():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(_bytes(state["torch"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _text(state: Tensor) -> str:
    return b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(b64decode(text)), dtype=torch.uint8)


def _copied(tensor: Tensor) -> Tensor:
    """On the CPU, so that training goes on with the original; what is shared out stays so."""
    if isinstance(tensor, DTensor):
        return DTensor(tensor._local_tensor.to("cpu", copy=True), tensor._spec, requires_grad=False)
    return tensor.to("cpu", copy=True)


def _quiet() -> None:
    """DCP warns of a run in one process, which is as good as any."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own(output: Path) -> int:
    """A descriptor that holds the directory's lock, which ends with the process however it ends."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / ".owner"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{output} belongs to another run, {file.read_text()}: choose another directory") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    for stale in output.glob(f"step_*{WRITING}"):
        shutil.rmtree(stale, ignore_errors=True)
    return descriptor
