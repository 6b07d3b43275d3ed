"""Decoding, memory and loading under tensor parallelism, by plain launches: random weights, bf16, batch 2.

    torchrun --nproc_per_node=2 benchmarks/tensor_parallel.py [--load] [--json FILE]

`--load` also writes Llama-2-7B as safetensors (13.5 GB, in a temporary directory) and loads it into the ranks.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fms.distributed.launch import launch
from fms.models import freeze, get_model
from fms.models.convert import save_model
from fms.utils.generation import generate

MODELS = (("llama", "2-7b"), ("granite", "8b"))
PROMPTS, BATCH, NEW = (256, 512, 1024), 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", action="store_true", help="write a checkpoint and load it (default: only decode)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    device = launch("cuda")
    rows: list[dict[str, Any]] = []

    def row(**figures: Any) -> None:
        rows.append(figures)
        if dist.get_rank() == 0:
            print(json.dumps(figures), flush=True)

    row(what="machine", torch=torch.__version__, device=torch.cuda.get_device_name(), ranks=dist.get_world_size())
    for architecture, variant in MODELS:
        decode(architecture, variant, device, row)
    if args.load:
        load(row)
    if args.json and dist.get_rank() == 0:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def decode(architecture: str, variant: str, device: torch.device, row: Callable[..., None]) -> None:
    torch.manual_seed(0)
    name = f"{architecture} {variant}"
    model = freeze(get_model(architecture, variant, device_type="cuda", data_type="bf16"))
    row(what="weights a rank", model=name, gb=round(held(model), 3))
    for length in PROMPTS:
        ids = torch.randint(model.config.src_vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(1))
        torch.cuda.reset_peak_memory_stats()
        row(what="decode", model=name, prompt=length, **times(model, ids.to(device)))
    del model
    torch.cuda.empty_cache()


@torch.inference_mode()
def times(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Milliseconds a token of one step and of a generation, and of a forward without a cache; peak GB."""
    cache = model.make_cache(BATCH, ids.shape[1] + 80)
    model(ids, cache=cache, last_n_tokens=1)
    step = [timed(lambda: model(ids[:, :1], cache=cache, last_n_tokens=1, local=True)) for _ in range(60)]
    forward = [timed(lambda: model(ids, last_n_tokens=1)) for _ in range(4)]
    for _ in range(2):
        _, seconds = generate(model, ids, max_new_tokens=NEW, timing="e2e")
    return {
        "single_ms": round(statistics.median(step[10:]), 2),
        "end_to_end_ms": round(seconds[0] / NEW * 1e3, 2),
        "forward_ms": round(min(forward), 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def load(row: Callable[..., None]) -> None:
    paths = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(paths)
    path = Path(str(paths[0])) / "model"
    if dist.get_rank() == 0:
        whole = get_model("llama", "2-7b", device_type="cuda", data_type="bf16", distributed_strategy="none")
        save_model(whole, path, "hf")
        del whole
        torch.cuda.empty_cache()
    dist.barrier()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    model = get_model(model_path=path, device_type="cuda")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    row(what="load", seconds=round(seconds, 2), host_gb=round(grown, 3), weights_gb=round(held(model), 3))


def held(model: torch.nn.Module) -> float:
    """GB of weights on this rank."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters()) / 1e9


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
