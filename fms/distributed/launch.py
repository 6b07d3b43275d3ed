"""A process's place among others: device, process group, a clean end."""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from fms.utils.devices import device_of


def launch(device_type: str = "auto", timeout: float = 120.0) -> torch.device:
    """Join the processes that torchrun started, if it did, and return this one's device.

    NCCL on GPUs, one a process, gloo on a CPU. `timeout`, in seconds, is how long a collective waits for a rank that
    does not come. Calling it again does nothing more.
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
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
