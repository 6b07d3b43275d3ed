"""A process's place among others: device, process group, a clean end."""

import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fms.utils.devices import device_of


def launch(device_type: str = "auto", timeout: float = 120.0) -> torch.device:
    """Join the processes that torchrun started, if it did, and return this one's device.

    NCCL on GPUs, one a process, gloo on a CPU. `timeout`, in seconds, is how long a collective waits for a rank that
    does not come. An error that nobody catches ends the process, and torchrun the others: the rank that has it speaks
    first, then those that waited for it, and torchrun's summary has the tracebacks. Calling it again does nothing more.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device_of(device_type)
    device = torch.device("cuda", local) if kind.type == "cuda" and kind.index is None else kind
    if device.type == "cuda":
        torch.cuda.set_device(device_of(str(device)))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        wait = timedelta(seconds=timeout)
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=wait))
        # an attempt after a failure must not find the keys of the one before
        attempt = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        gpu = device if device.type == "cuda" else None
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=wait, device_id=gpu)
        atexit.register(_leave)
        sys.excepthook = partial(_failed, sys.excepthook)
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _failed(tell: Callable, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """At the end of a process that failed: others may wait for it, but it for nobody."""
    atexit.unregister(_leave)
    frames = traceback.extract_tb(trace)
    if frames and Path(frames[-1].filename).parent.name == "distributed":
        time.sleep(1)  # out of a collective: another rank is to blame, whose error comes first
    tell(kind, error, trace)
    try:
        raise error.with_traceback(trace)
    except BaseException as raised:  # the handler describes what is being handled
        get_error_handler().record_exception(raised)
