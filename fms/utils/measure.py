"""What a device does, from outside, and what a model asks of it: memory, bandwidth, bytes to read, a timeline; and
how long its tokens took."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fms.modules.moe import MixtureOfExperts


@dataclass
class Timing:
    """Seconds: of the prefill with its first token, and of each step after."""

    first_token: float = 0.0
    steps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0

    @property
    def total(self) -> float:
        return self.first_token + sum(self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, a row."""
        return len(self.steps) / sum(self.steps) if self.steps else 0.0


def step_bytes(model: Any, rows: int, tokens: int) -> int:
    """Bytes that one token of each row must read on this rank: weights, and the cache of `tokens` a row.

    Of an embedding that is not the head too, a few rows are read, which count as nothing; of experts, as many as the
    rows can choose.
    """
    unread = {id(model.embedding._parameters["weight"])} - {id(model.head._parameters["weight"])}
    if model.position_embedding is not None:
        unread.add(id(model.position_embedding._parameters["weight"]))
    size = 0.0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            chosen = min(1.0, rows * module.top_k / module.gate.out_features)
            size -= (1 - chosen) * sum(map(_bytes, module.experts.parameters()))
    size += sum(_bytes(parameter) for parameter in model.parameters() if id(parameter) not in unread)
    of_a_token = sum(layer.k.nbytes + layer.v.nbytes for layer in model.make_cache(1, 1).layers)
    return int(size) + rows * min(tokens, model.window or tokens) * of_a_token


def _bytes(parameter: Any) -> int:
    return getattr(parameter, "_local_tensor", parameter).nbytes


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which this device sums a tensor that no cache holds: the best of several."""
    size = 1 << 28
    if device.type == "cuda":
        size = min(1 << 31, torch.cuda.mem_get_info(device)[0] // 4)
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    best, sums = float("inf"), 8 if device.type == "cuda" else 1  # launching takes a part of one
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(sums):
            data.sum()
        synchronise(device)
        best = min(best, (time.perf_counter() - start) / sums)
    size = data.nbytes
    del data
    reset_peak(device)  # else what comes next takes a part of its room, and the rest stays reserved
    return size / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes allocated and reserved since `reset_peak`; of a CPU it is not known."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def trace(run: Callable[[], Any], file: Path, device: torch.device) -> None:
    """A timeline of one run, for chrome://tracing or Perfetto, and beside it a table of the operations as text."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        run()
        synchronise(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(file))
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    file.with_suffix(".txt").write_text(found.key_averages().table(sort_by=by, row_limit=40))
