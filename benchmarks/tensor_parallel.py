"""Tensor parallelism: tokens beside one GPU's, decoding by plain launches, memory, loading; peers in the same cells.

    torchrun --nproc_per_node=2 benchmarks/tensor_parallel.py [--checkpoint DIR] [--json FILE]
    PYTHONPATH=PEER torchrun --nproc_per_node=2 benchmarks/tensor_parallel.py --which ibm-fms [--json FILE]
    torchrun --nproc_per_node=2 benchmarks/tensor_parallel.py --which transformers --checkpoint DIR [--json FILE]

Random weights, bf16, batch 2; FMS_COMMUNICATOR=nccl leaves out symmetric memory. With `--checkpoint` Llama-2-7B
(13.5 GB) is written there as safetensors, if it is not there yet, and loaded into the ranks, by transformers with
tp_plan="auto". The existing FMS is imported as `fms` too, so it stands in a folder of its own
(pip install --no-deps --target PEER ibm-fms==1.13.1). `--tiny` tries all of it on a CPU. A cell that fails is a row
with its error.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MODELS: tuple[tuple[str, str, dict[str, Any]], ...] = (("llama", "2-7b", {}), ("granite", "8b", {}))
PROMPTS, BATCH, NEW, STEPS = (256, 512, 1024), 2, 64, 60
SMALL = {"src_vocab_size": 1000, "emb_dim": 256, "nheads": 8, "kvheads": 4, "nlayers": 4, "max_expected_seq_len": 512}
TINY = SMALL | {"nlayers": 2, "max_expected_seq_len": 128}
SAMPLED: tuple[dict[str, Any], ...] = ({}, {"seed": 3, "top_k": 20})


class Bench:
    """One process among others, what is to be run, and the rows so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows = args, []
        self.device = torch.device("cpu") if args.tiny else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        self.models = tuple((name, variant, TINY) for name, variant, _ in MODELS) if args.tiny else MODELS
        self.prompts, self.new, self.steps = ((8, 16), 4, 12) if args.tiny else (PROMPTS, NEW, STEPS)
        self.dtype = torch.bfloat16
        if not args.tiny:
            torch.cuda.set_device(self.device)
        backend = "gloo" if args.tiny else "nccl"
        dist.init_process_group(backend, device_id=None if args.tiny else self.device, timeout=timedelta(seconds=180))
        self.row(
            what="machine",
            which=args.which,
            torch=torch.__version__,
            python=sys.version.split()[0],
            device="cpu" if args.tiny else torch.cuda.get_device_name(),
            ranks=dist.get_world_size(),
            communicator=os.environ.get("FMS_COMMUNICATOR", "auto"),
        )

    def row(self, **figures: Any) -> None:
        self.rows.append(figures)
        if dist.get_rank() == 0:
            print(json.dumps(figures), flush=True)
            if self.args.json:
                self.args.json.write_text(json.dumps(self.rows, indent=1) + "\n")

    def cell(self, run: Callable[[], dict[str, Any]], **about: Any) -> None:
        self.sync()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            figures = run()
        except (RuntimeError, ValueError, TypeError, KeyError, ImportError) as error:
            figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        self.row(**about, **figures)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any]) -> float:
        """Milliseconds."""
        self.sync()
        start = time.perf_counter()
        call()
        self.sync()
        return (time.perf_counter() - start) * 1e3

    def ids(self, vocabulary: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(vocabulary, (BATCH, length), generator=generator).to(self.device)

    def peak(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {
            "allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", choices=tuple(RUNS), default="fms", help="whose figures (default: fms)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="write and load a checkpoint (default: none)")
    parser.add_argument("--tiny", action="store_true", help="small sizes on a CPU: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    bench = Bench(args)
    with torch.inference_mode():
        RUNS[args.which](bench)
    dist.barrier()
    dist.destroy_process_group()


def ours(bench: Bench) -> None:
    from fms.models import freeze, get_model

    def made(architecture: str, variant: str, dtype: torch.dtype, strategy: str, fields: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        kind = bench.device.type
        return freeze(
            get_model(architecture, variant, device_type=kind, data_type=dtype, distributed_strategy=strategy, **fields)
        )

    for architecture in ("llama", "granite"):
        both = [made(architecture, "8b" if architecture == "granite" else "micro", torch.float32, strategy, SMALL)
                for strategy in ("none", "tp")]  # fmt: skip
        for options in SAMPLED:
            run = lambda both=both, options=options: same_tokens(bench, *both, options)
            bench.cell(run, what="fp32 tokens equal one process's", model=architecture, options=str(options))
    del both
    for architecture, variant, fields in bench.models:
        name = f"{architecture} {variant}"
        model = made(architecture, variant, bench.dtype, "tp", fields)
        bench.row(what="weights a rank", model=name, gb=round(held(model), 3))
        for length in bench.prompts:
            ids = bench.ids(model.config.src_vocab_size, length)
            bench.cell(lambda model=model, ids=ids: decoded(bench, model, ids), model=name, prompt=length)
        del model
    if bench.args.checkpoint:
        write(bench)
        bench.cell(lambda: loaded(bench), what="load", model="llama 2-7b")


def same_tokens(bench: Bench, one: Any, many: Any, options: dict[str, Any]) -> dict[str, Any]:
    """On every rank, for rows of unequal lengths; and how far logits are apart."""
    from fms.utils.generation import generate

    ids = bench.ids(SMALL["src_vocab_size"], 30)
    rows = [ids[0], ids[1, :11]]
    want, got = (generate(model, rows, max_new_tokens=40, **options) for model in (one, many))
    equal = torch.tensor(all(map(torch.equal, want, got)), dtype=torch.int32, device=bench.device)
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    logits = one(ids)
    apart = (many(ids) - logits).abs().max() / logits.abs().max()
    return {"equal": bool(equal), "logits_apart": f"{float(apart):.1e}"}


def decoded(bench: Bench, model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Milliseconds a token of one step and of a generation, and of a forward without a cache; peak memory."""
    from fms.utils.generation import generate

    cache = model.make_cache(BATCH, ids.shape[1] + bench.steps + 1)
    model(ids, cache=cache, last_n_tokens=1)
    comm = model.comm
    comm.counts.clear()
    step = [
        bench.timed(lambda: model(ids[:, :1], cache=cache, last_n_tokens=1, local=True)) for _ in range(bench.steps)
    ]
    sums = {name: [n // bench.steps for n in tally] for name, tally in comm.counts.items()}
    forward = [bench.timed(lambda: model(ids, last_n_tokens=1)) for _ in range(4)]
    for _ in range(2):
        _, seconds = generate(model, ids, max_new_tokens=bench.new, eos_token_id=(), capture=False, timing="e2e")
    return {
        "single_ms": round(statistics.median(step[10:]), 2),
        "end_to_end_ms": round(seconds[0] / bench.new * 1e3, 2),
        "forward_ms": round(min(forward), 2),
        "a_step": sums,  # calls and bytes
        **bench.peak(),
    }


def write(bench: Bench) -> None:
    """The checkpoint, by the first rank, which holds all of it for as long."""
    from fms.models import get_model
    from fms.models.convert import save_model

    path = bench.args.checkpoint
    if dist.get_rank() == 0 and not path.exists():
        fields = TINY if bench.args.tiny else {}
        kind = bench.device.type
        whole = get_model(
            "llama", "2-7b", device_type=kind, data_type=bench.dtype, distributed_strategy="none", **fields
        )
        save_model(whole, path, "hf")
    gc.collect()
    dist.barrier()


def loaded(bench: Bench) -> dict[str, Any]:
    from fms.models import get_model

    return load(bench, lambda: get_model(model_path=bench.args.checkpoint, device_type=bench.device.type))


def load(bench: Bench, call: Callable[[], Any]) -> dict[str, Any]:
    """Seconds until the last rank has it, GB that the host's memory grew by at its peak, and of weights on a rank."""
    reset_peak()
    before = peak_of_host()
    dist.barrier()
    start = time.perf_counter()
    model = call()
    bench.sync()
    dist.barrier()
    seconds = time.perf_counter() - start
    figures = {"seconds": round(seconds, 2), "host_gb": round(peak_of_host() - before, 3)}
    return figures | {"weights_gb": round(held(model), 3)} | bench.peak()


def ibm(bench: Bench) -> None:
    """Its own way to generate, and its forward with a cache."""
    import importlib.metadata

    from fms.models import get_model
    from fms.utils.generation import generate

    torch._C._distributed_c10d._register_process_group("default", dist.group.WORLD)  # the name that it asks for
    bench.row(what="version", ibm_fms=importlib.metadata.version("ibm-fms"))
    torch.set_default_dtype(torch.float32 if bench.args.tiny else bench.dtype)

    def cells(model: Any, ids: torch.Tensor) -> dict[str, Any]:
        _, cache = model(ids, use_cache=True)
        token = ids[:, :1]
        step = [
            bench.timed(lambda: model(token, past_key_value_states=cache, use_cache=True)) for _ in range(bench.steps)
        ]
        run = lambda: generate(model, ids, max_new_tokens=bench.new, do_sample=False, use_cache=True)
        run()
        whole = statistics.median([bench.timed(run) for _ in range(3)])
        return {
            "single_ms": round(statistics.median(step[10:]), 2),
            "end_to_end_ms": round(whole / bench.new, 2),
            **bench.peak(),
        }

    for architecture, variant, fields in bench.models:
        name = f"{architecture} {variant}"
        fields = {key: value for key, value in fields.items() if key != "max_expected_seq_len"}
        try:
            torch.manual_seed(0)
            model = get_model(architecture, variant, device_type=bench.device.type, distributed_strategy="tp",
                              group=dist.group.WORLD, **fields).eval()  # fmt: skip
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            bench.row(what="model", model=name, error=str(error)[:300])
            continue
        bench.row(what="weights a rank", model=name, gb=round(held(model), 3))
        for length in bench.prompts:
            ids = bench.ids(model.config.src_vocab_size, length)
            bench.cell(lambda model=model, ids=ids: cells(model, ids), model=name, prompt=length)
        del model


def transformers(bench: Bench) -> None:
    import transformers as hf

    bench.row(what="version", transformers=hf.__version__)
    kept: list[Any] = []

    def call() -> Any:
        kept.append(hf.AutoModelForCausalLM.from_pretrained(bench.args.checkpoint, dtype="auto", tp_plan="auto"))
        return kept[0]

    def cells(ids: torch.Tensor) -> dict[str, Any]:
        how = {"max_new_tokens": bench.new, "min_new_tokens": bench.new, "do_sample": False, "pad_token_id": 0}
        run = lambda: kept[0].generate(ids, attention_mask=torch.ones_like(ids), **how)
        run()
        whole = statistics.median([bench.timed(run) for _ in range(3)])
        return {"end_to_end_ms": round(whole / bench.new, 2), **bench.peak()}

    bench.cell(lambda: load(bench, call), what="load", model="llama 2-7b")
    if kept:
        for length in bench.prompts:
            ids = bench.ids(kept[0].config.vocab_size, length)
            bench.cell(lambda ids=ids: cells(ids), model="llama 2-7b", prompt=length)


RUNS: dict[str, Callable[[Bench], None]] = {"fms": ours, "ibm-fms": ibm, "transformers": transformers}


def held(model: torch.nn.Module) -> float:
    """GB of weights on this rank."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters()) / 1e9


def reset_peak() -> None:
    """Let the kernel forget the highest memory so far, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_of_host() -> float:
    """GB, of memory that is no file's, at the most; the highest resident one where the kernel does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
