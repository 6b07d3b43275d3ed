"""The existing FMS in the cells that ours are compared in: eager (and compiled), cached, bf16, random weights, one GPU.

    pip install --no-deps --target PEER ibm-fms==1.13.1
    PYTHONPATH=PEER python benchmarks/ibm_fms.py [--variant 7b] [--seq_len 512] [--compile] [--json FILE]

It has the same import name as ours, so it stands in a folder of its own and runs by itself.
"""

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fms.models import get_model
from fms.utils.generation import generate

BATCH, NEW, REPEATS = 2, 64, 3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llama")
    parser.add_argument("--variant", default="7b")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="compiled cells too")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = get_model(args.architecture, args.variant, device_type="cuda").eval()
    known = {"version": importlib.metadata.version("ibm-fms"), "torch": torch.__version__}
    known |= {"device": torch.cuda.get_device_name(), "model": f"{args.architecture} {args.variant}"}
    rows: list[dict[str, Any]] = []
    for mode in ("eager", "compiled")[: 1 + args.compile]:
        run: Any = model if mode == "eager" else torch.compile(model, dynamic=True)
        for task, ms in cells(run, model.config.src_vocab_size, args.seq_len).items():
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            rows.append(known | {"mode": mode, "task": task, "seq_len": args.seq_len, "batch": BATCH, "ms": ms})
            rows[-1] |= {"allocated": allocated, "reserved": reserved}
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def cells(model: Any, vocabulary: int, seq_len: int) -> dict[str, float]:
    ids = torch.randint(vocabulary, (BATCH, seq_len), device="cuda")
    logits, cache = model(ids, use_cache=True, last_n_tokens=1)
    token = logits[:, -1:].argmax(-1)

    def single() -> None:
        for _ in range(NEW):
            model(token, past_key_value_states=cache, use_cache=True, last_n_tokens=1)[0].argmax(-1)
            torch.cuda.synchronize()

    def uncached() -> None:
        model(torch.cat((ids, token), 1), last_n_tokens=1).argmax(-1)

    def generation() -> None:
        generate(model, ids, max_new_tokens=NEW, do_sample=False, use_cache=True)

    return {
        "single, cached": timed(single, NEW),
        "single, uncached": timed(uncached, 1),
        "e2e, cached": timed(generation, NEW),
    }


def timed(run: Callable[[], None], tokens: int) -> float:
    """Milliseconds a token: the median after one run to warm up."""
    run()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / tokens)
    return statistics.median(times)


if __name__ == "__main__":
    main()
