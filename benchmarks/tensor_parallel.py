"""Tensor parallelism: tokens beside one GPU's, decoding, memory, loading; peers in the same cells.

    python benchmarks/write_llama.py DIR
    torchrun --nproc_per_node=2 benchmarks/tensor_parallel.py --which fms transformers more --checkpoint DIR
    PYTHONPATH=PEER torchrun --nproc_per_node=2 benchmarks/tensor_parallel.py --which ibm-fms [--json FILE]

Random weights, bf16, batch 2; FMS_COMMUNICATOR=nccl leaves out symmetric memory. With `--checkpoint` the Llama-2-7B
of `write_llama.py` is waited for and loaded into the ranks, by transformers with tp_plan="auto". The existing FMS is
imported as `fms` too, so it stands in a folder of its own (pip install --no-deps --target PEER ibm-fms==1.13.1).
`--tiny` tries all of it on a CPU.

What is wanted most comes first. A cell that fails is a row with its error; after `--within` seconds no other begins,
and a rank that is lost ends the program: the rows so far are in the file.
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MODELS: dict[str, tuple[str, str]] = {"7b": ("llama", "2-7b"), "granite": ("granite", "8b"), "70b": ("llama", "2-70b")}
PROMPTS, BATCH, NEW, STEPS = (512, 256, 1024), 2, 64, 40
SMALL = {"src_vocab_size": 1000, "emb_dim": 256, "nheads": 8, "kvheads": 4, "nlayers": 4, "hidden_dim": 704}
TINY = SMALL | {"nlayers": 2}
SAMPLED: tuple[dict[str, Any], ...] = ({}, {"seed": 3, "top_k": 20})
WHOSE = "whose figures; more: of ours the models after the first (default: fms more)"
LOST = 60  # seconds after which a rank that does not come is given up


class Bench:
    """One process among others, what is to be run, and the rows so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows = args, []
        self.begun = time.monotonic()
        self.device = torch.device("cpu") if args.tiny else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        self.fields = TINY if args.tiny else {}
        self.models = {name: MODELS[name] for name in args.models}
        self.prompts = args.prompts or ((8, 16) if args.tiny else PROMPTS)
        self.new, self.steps = (4, 12) if args.tiny else (NEW, STEPS)
        self.dtype = torch.bfloat16
        if not args.tiny:
            torch.cuda.set_device(self.device)
        backend, gpu = ("gloo", None) if args.tiny else ("nccl", self.device)
        dist.init_process_group(backend, device_id=gpu, timeout=timedelta(seconds=LOST))
        if args.within:
            watch = threading.Timer(args.within + LOST, os._exit, [4])
            watch.daemon = True
            watch.start()
        self.row(
            what="machine",
            which=" ".join(args.which),
            torch=torch.__version__,
            python=sys.version.split()[0],
            device="cpu" if args.tiny else torch.cuda.get_device_name(),
            ranks=dist.get_world_size(),
            communicator=os.environ.get("FMS_COMMUNICATOR", "auto"),
        )

    def row(self, **figures: Any) -> None:
        self.rows.append(figures | {"at": round(time.monotonic() - self.begun, 1)})
        if dist.get_rank() == 0:
            print(json.dumps(self.rows[-1]), flush=True)
            if self.args.json:
                self.args.json.write_text(json.dumps(self.rows, indent=1) + "\n")

    def cell(self, run: Callable[[], dict[str, Any]], **about: Any) -> None:
        if self.late():
            self.row(**about, skipped=True)
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        figures = tried(run)
        self.row(**about, **({"error": figures} if isinstance(figures, str) else figures))

    def late(self) -> bool:
        """Whether time is up on any rank."""
        return not self.everywhere(time.monotonic() - self.begun < (self.args.within or math.inf))

    def everywhere(self, true: bool) -> bool:
        """Whether it is true on all ranks."""
        every = torch.tensor(true, dtype=torch.int32, device=self.device)
        dist.all_reduce(every, dist.ReduceOp.MIN)
        return bool(every)

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


def tried(run: Callable[[], Any]) -> Any:
    """What it gives, or its error as text."""
    try:
        return run()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", nargs="+", choices=RUNS, default=["fms", "more"], help=WHOSE)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7b", "granite"], help="(default: 7b granite)")
    parser.add_argument("--prompts", nargs="+", type=int, help=f"tokens (default: {PROMPTS})")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a Llama-2-7B to be loaded (default: none)")
    parser.add_argument("--within", type=float, default=0.0, help="seconds after which no cell begins (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small sizes on a CPU: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    bench = Bench(args)
    with torch.inference_mode():
        for one in args.which:
            RUNS[one](bench)
    dist.barrier()
    dist.destroy_process_group()


def ours(bench: Bench) -> None:
    decode(bench, next(iter(bench.models)))
    for architecture, variant in (("llama", "micro"), ("granite", "8b")):
        bench.cell(
            lambda a=architecture, v=variant: same_tokens(bench, a, v),
            what="fp32 tokens equal one process's",
            model=architecture,
        )
    if bench.args.checkpoint:
        for _ in range(2):  # the first time files may come from a disk
            bench.cell(lambda: loaded(bench), what="load", model="llama 2-7b")


def more(bench: Bench) -> None:
    for name in list(bench.models)[1:]:
        decode(bench, name)


def made(bench: Bench, architecture: str, variant: str, dtype: torch.dtype, strategy: str, fields: Any) -> Any:
    from fms.models import freeze, get_model

    torch.manual_seed(0)
    how = {"device_type": bench.device.type, "data_type": dtype, "distributed_strategy": strategy}
    return freeze(get_model(architecture, variant, **how, **fields))


def decode(bench: Bench, name: str) -> None:
    """The cells of a model."""
    architecture, variant = bench.models[name]
    kept: list[Any] = []

    def weights() -> dict[str, Any]:
        kept.append(made(bench, architecture, variant, bench.dtype, "tp", bench.fields))
        return {"gb": round(held(kept[0]), 3), "sums": str(kept[0].comm.symmetric), **bench.peak()}

    bench.cell(weights, what="weights a rank", model=name)
    if not kept:
        return
    for length in bench.prompts:
        ids = bench.ids(kept[0].config.src_vocab_size, length)
        bench.cell(lambda ids=ids: decoded(bench, kept[0], ids), model=name, prompt=length)
    total = held(kept[0]) * dist.get_world_size()
    if bench.device.type == "cpu" or torch.cuda.mem_get_info()[0] > total * 1.3e9:
        bench.cell(lambda: beside_one(bench, kept[0], name), what="tokens beside one GPU's", model=name)


def same_tokens(bench: Bench, architecture: str, variant: str) -> dict[str, Any]:
    """On every rank, for rows of unequal lengths; and how far logits are apart."""
    from fms.utils.generation import generate

    one, many = (made(bench, architecture, variant, torch.float32, how, SMALL) for how in ("none", "tp"))
    ids, equal = bench.ids(SMALL["src_vocab_size"], 30), True
    for options in SAMPLED:
        want, got = (generate(model, [ids[0], ids[1, :11]], max_new_tokens=40, **options) for model in (one, many))
        equal &= all(map(torch.equal, want, got))
    logits = one(ids)
    apart = (many(ids) - logits).abs().max() / logits.abs().max()
    return {"equal": bench.everywhere(equal), "logits_apart": f"{float(apart):.1e}"}


def beside_one(bench: Bench, many: Any, name: str) -> dict[str, Any]:
    """After how many tokens a row, of all, greedy ones in bf16 are no longer those of the same weights on one GPU; sums
    in another order are rounded otherwise, and random weights give near ties."""
    from fms.utils.generation import generate

    one = made(bench, *bench.models[name], bench.dtype, "none", bench.fields)
    figures: dict[str, Any] = {}
    for length in bench.prompts:
        ids = bench.ids(many.config.src_vocab_size, length)
        want, got = (generate(model, ids, max_new_tokens=bench.new, eos_token_id=()) for model in (one, many))
        alike = (want == got)[:, length:].int().cumprod(1).sum(1).tolist()
        logits = one(ids, last_n_tokens=1)
        apart = (many(ids, last_n_tokens=1) - logits).abs().max() / logits.abs().max()
        figures[f"alike_{length}"], figures[f"logits_apart_{length}"] = alike, f"{float(apart):.1e}"
    return figures | {"of": bench.new}


def decoded(bench: Bench, model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Milliseconds a token of one step and of a generation, and of a forward without a cache; peak memory."""
    from fms.utils.generation import generate

    cache = model.make_cache(BATCH, ids.shape[1] + 2 * bench.steps + 1)
    model(ids, cache=cache, last_n_tokens=1)
    comm = model.comm

    def step() -> float:
        run = lambda: model(ids[:, :1], cache=cache, last_n_tokens=1, local=True)
        return round(statistics.median([bench.timed(run) for _ in range(bench.steps)][10:]), 2)

    def whole(capture: bool) -> float:
        how = {"eos_token_id": (), "capture": capture, "timing": "e2e"}
        for _ in range(2):
            _, (seconds,) = generate(model, ids, max_new_tokens=bench.new, **how)
        return round(seconds / bench.new * 1e3, 2)

    comm.counts.clear()
    figures: dict[str, Any] = {"single_ms": tried(step)}
    sums = {name: [n // bench.steps for n in tally] for name, tally in comm.counts.items()}
    if (symmetric := comm.symmetric) is not None:
        comm.symmetric = None
        figures["single_ms_by_nccl"] = tried(step)
        comm.symmetric = symmetric
    figures["end_to_end_ms"] = tried(lambda: whole(False))
    forward = lambda: round(min(bench.timed(lambda: model(ids, last_n_tokens=1)) for _ in range(3)), 2)
    figures["forward_ms"] = tried(forward)
    comm.sequence_parallel = True
    figures["forward_ms_tokens_shared_out"] = tried(forward)
    comm.sequence_parallel = False
    if bench.device.type == "cuda":
        figures["captured_ms"] = tried(lambda: whole(True))
    return figures | {"a_step": sums} | bench.peak()  # calls and bytes


def there(bench: Bench) -> Path:
    """The checkpoint, which another process may be writing yet."""
    path, until = bench.args.checkpoint, time.monotonic() + LOST / 2
    while not (path / "config.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    return path


def loaded(bench: Bench) -> dict[str, Any]:
    from fms.models import get_model

    there(bench)
    return load(bench, lambda: get_model(model_path=bench.args.checkpoint, device_type=bench.device.type))


def load(bench: Bench, call: Callable[[], Any]) -> dict[str, Any]:
    """Seconds until the last rank has it, GB that the host's memory grew by at its peak, and of weights on a rank."""
    dist.barrier()
    start = time.perf_counter()
    model, host = watched(call)
    bench.sync()
    dist.barrier()
    figures = {"seconds": round(time.perf_counter() - start, 2), "host_gb": round(host, 3)}
    return figures | {"weights_gb": round(held(model), 3)} | bench.peak()


def watched(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and how many GB this process's memory that is no file's grew by at its peak."""

    def now() -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) * 1024 / 1e9

    def look() -> None:
        while not ended.wait(0.01):
            seen.append(now())

    seen, ended = [now()], threading.Event()
    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        return call(), max(seen) - seen[0]
    finally:
        ended.set()
        watch.join()


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
        whole = bench.timed(run)
        return {
            "single_ms": round(statistics.median(step[10:]), 2),
            "end_to_end_ms": round(whole / bench.new, 2),
            **bench.peak(),
        }

    for name, (architecture, variant) in bench.models.items():
        fields = {key: value for key, value in bench.fields.items() if key != "hidden_dim"}
        kept: list[Any] = []

        def weights(where: tuple[str, str] = (architecture, variant), kept: Any = kept, fields: Any = fields) -> Any:
            torch.manual_seed(0)
            kept.append(get_model(*where, device_type=bench.device.type, distributed_strategy="tp",
                                  group=dist.group.WORLD, **fields).eval())  # fmt: skip
            return {"gb": round(held(kept[0]), 3), **bench.peak()}

        bench.cell(weights, what="weights a rank", model=name)
        for length in bench.prompts if kept else ():
            ids = bench.ids(kept[0].config.src_vocab_size, length)
            bench.cell(lambda model=kept[0], ids=ids: cells(model, ids), model=name, prompt=length)


def transformers(bench: Bench) -> None:
    import transformers as hf

    bench.row(what="version", transformers=hf.__version__)
    kept: list[Any] = []

    def call() -> Any:
        kept[:] = [hf.AutoModelForCausalLM.from_pretrained(bench.args.checkpoint, dtype="auto", tp_plan="auto")]
        return kept[0]

    def cells(ids: torch.Tensor) -> dict[str, Any]:
        how = {"max_new_tokens": bench.new, "min_new_tokens": bench.new, "do_sample": False, "pad_token_id": 0}
        run = lambda: kept[0].generate(ids, attention_mask=torch.ones_like(ids), **how)
        bench.timed(run)
        return {"end_to_end_ms": round(bench.timed(run) / bench.new, 2), **bench.peak()}

    there(bench)
    bench.cell(lambda: load(bench, call), what="load by transformers", model="llama 2-7b")
    if kept:
        ids = bench.ids(kept[0].config.vocab_size, bench.prompts[0])
        bench.cell(lambda: cells(ids), what="transformers", model="llama 2-7b", prompt=bench.prompts[0])


RUNS: dict[str, Callable[[Bench], None]] = {"fms": ours, "more": more, "ibm-fms": ibm, "transformers": transformers}


def held(model: torch.nn.Module) -> float:
    """GB of weights on this rank."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters()) / 1e9


if __name__ == "__main__":
    main()
