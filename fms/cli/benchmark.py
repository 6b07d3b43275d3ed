"""`fms benchmark`: how long a token takes and what memory, in every way to run; the words of the existing script."""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms.cli import flags

if TYPE_CHECKING:
    from fms.utils.benchmark import Cell, Mode

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def add_flags(parser: flags.Parser) -> None:
    model = flags.add_weights(parser, tokenizer="none: random ids")
    model.add_argument("--dtype", default="bf16", metavar="NAME", help="fp32, bf16 or fp16 (default: bf16)")
    flags.add_compile(model, None, "blocks, in the cells called compiled")
    size = parser.add_argument_group("sizes")
    many = "several with commas between are measured one after the other"
    size.add_argument(
        "--seq_len", type=counts, default=[512], metavar="N", help=f"tokens of a prompt; {many} (default: 512)"
    )
    size.add_argument("--batch_size", type=counts, default=[2], metavar="N", help=f"prompts; {many} (default: 2)")
    size.add_argument(
        "--max_new_tokens",
        type=flags.count,
        default=256,
        metavar="N",
        help="tokens to make of each prompt (default: 256)",
    )
    size.add_argument(
        "--repeats",
        type=flags.count,
        default=3,
        metavar="N",
        help="measurements, of which the median counts (default: 3)",
    )
    size.add_argument(
        "--bandwidth", type=float, metavar="GB/S", help="of the memory, for the limit (default: measured first)"
    )

    what = parser.add_argument_group("what is measured (default: everything)")
    for flag, text in (
        ("--skip_correctness_check", "comparing tokens and logits"),
        ("--skip_eager_runs", "plain launches"),
        ("--skip_captured_runs", "the decode step as a CUDA graph"),
        ("--skip_compile_runs", "the compiled model"),
        ("--skip_plain_attention_runs", "attention as products and a softmax, beside SDPA"),
        ("--skip_kvcache_runs", "runs with a cache"),
        ("--skip_nokvcache_runs", "runs without a cache"),
        ("--skip_single_token_runs", "one token again and again"),
        ("--skip_e2e_runs", "whole generations"),
    ):
        what.add_argument(flag, action="store_true", help=f"without {text} (default: with)")
    what.add_argument(
        "--compile_mode",
        choices=COMPILE_MODES,
        help="torch.compile the whole forward in this mode, unless --compile is given (default: as --compile)",
    )
    what.add_argument(
        "--deterministic", action="store_true", help="deterministic algorithms only, seed 42 (default: not)"
    )
    what.add_argument(
        "--distributed",
        action="store_true",
        help="an error where torchrun did not start several (default: as torchrun did)",
    )
    what.add_argument(
        "--unfuse_weights", action="store_true", help="has no effect: inference fuses them (default: fused)"
    )

    out = parser.add_argument_group("output")
    out.add_argument(
        "--json",
        type=flags.path,
        metavar="FILE",
        help="all figures; - for standard output, in place of the tables (default: tables only)",
    )
    out.add_argument(
        "--csv", type=flags.path, metavar="FILE", help="a line a cell; - for standard output, likewise (default: none)"
    )
    out.add_argument(
        "--plot", type=flags.path, metavar="DIRECTORY", help="charts as PNG, by matplotlib (default: none)"
    )
    out.add_argument(
        "--profile",
        type=flags.path,
        metavar="DIRECTORY",
        help="a timeline of one run of each cell; large, a small --max_new_tokens helps (default: none)",
    )
    flags.add_debug(parser)


def counts(text: str) -> list[int]:
    return [flags.count(word) for word in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Print the tables. The exit code is 1 if a result is wrong."""
    first = os.environ.get("RANK", "0") == "0"
    if args.distributed and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ValueError("--distributed needs several processes: start with torchrun")
    if args.json == args.csv == "-":
        raise ValueError("--json - and --csv - would both print: name a file for one of them")
    for name in filter(None, (args.json, args.csv)):
        if name != "-" and not (folder := Path(name).resolve().parent).is_dir():
            raise ValueError(f"{name}: there is no directory {folder}")
    if args.bandwidth is not None and args.bandwidth <= 0:
        raise ValueError(f"--bandwidth {args.bandwidth} must be positive, in GB/s")
    if args.unfuse_weights and first:
        print("--unfuse_weights has no effect", file=sys.stderr)
    if args.plot:
        from fms.utils.plots import pyplot

        pyplot()  # if it is not there, that is said before anything is measured
    keep = lambda machine, cells: save(machine, cells, args) if first else None
    machine, cells = measure(args, Progress(first), keep)
    if first:
        save(machine, cells, args, last=True)
        show(machine, cells, args)
    return 1 if any(cell.wrong for cell in cells) else 0


def texts(machine: dict[str, Any], cells: list["Cell"], args: argparse.Namespace) -> dict[str | None, str]:
    """What goes into the files asked for, by their names."""
    from fms.utils import figures

    program = Path(sys.argv[0]).name.replace("__main__.py", "fms")  # where it lies is no one's business
    report = {"command": [program, *sys.argv[1:]], "machine": machine, "cells": [asdict(cell) for cell in cells]}
    return {args.json: json.dumps(report, indent=1) + "\n", args.csv: figures.csv_lines(cells)}


def save(machine: dict[str, Any], cells: list["Cell"], args: argparse.Namespace, last: bool = False) -> None:
    """Write what there is so far, a run that is ended keeps its cells; to what is no file (a pipe) the `last` time."""
    for name, text in texts(machine, cells, args).items():
        if name in (None, "-"):
            continue
        file = Path(name).resolve()
        if file.is_file() or not file.exists():
            part = file.with_name(f"{file.name}.part")
            part.write_text(text)
            part.replace(file)
        elif last:
            file.write_text(text)


def show(machine: dict[str, Any], cells: list["Cell"], args: argparse.Namespace) -> None:
    from fms.utils import figures

    print(texts(machine, cells, args).get("-") or figures.tables(machine, cells), end="")
    if args.plot:
        from fms.utils.plots import plot

        for file in plot(cells, Path(args.plot)):
            print(f"wrote {file}", file=sys.stderr)


class Progress:
    """What stands on standard error while it runs; of several ranks the first one speaks."""

    def __init__(self, shown: bool):
        self.shown, self.done, self.of = shown, 0, 0

    def say(self, text: str) -> None:
        if self.shown:
            print(text, file=sys.stderr, flush=True)

    def cell(self, cell: "Cell") -> None:
        self.done += 1
        what = "one token" if cell.task == "single" else "end to end"
        cached = "cached" if cell.cached else "uncached"
        found = cell.note if cell.ms is None else f"{cell.ms:.3f} ms a token"
        check = f" ({cell.check})" if cell.check else ""
        self.say(
            f"[{self.done}/{self.of}] {cell.mode}, {what}, {cached}, {cell.batch_size} x {cell.seq_len}: {found}{check}"
        )


def measure(
    args: argparse.Namespace, progress: Progress, keep: Callable[[dict[str, Any], list["Cell"]], None]
) -> tuple[dict[str, Any], list["Cell"]]:
    """What was measured on, and the cells, in the order in which they were measured; `keep` gets those so far."""
    import torch

    from fms.models.compile import compile_model
    from fms.utils.benchmark import MODES, TASKS, Bench
    from fms.utils.measure import read_bandwidth

    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(42)
    model, machine, vocab = load(args, progress)
    bandwidth = args.bandwidth and args.bandwidth * 1e9
    if bandwidth is None:
        bandwidth = read_bandwidth(model.embedding.weight.device)
        progress.say(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
    machine |= {"bandwidth_gb_s": bandwidth / 1e9, "compile": compile_mode(args)}
    options: dict[str, Any] = {"repeats": args.repeats, "bandwidth": bandwidth, "vocab": vocab}
    options["check"] = not args.skip_correctness_check
    sizes = itertools.product(args.batch_size, args.seq_len)
    benches = [Bench(model, batch, length, args.max_new_tokens, **options) for batch, length in sizes]
    tasks = [
        task for task, skip in zip(TASKS, (args.skip_single_token_runs, args.skip_e2e_runs), strict=True) if not skip
    ]
    caches = [
        cached for cached in (True, False) if not (args.skip_kvcache_runs if cached else args.skip_nokvcache_runs)
    ]
    modes = [mode for mode in MODES if not skipped(mode, args)]
    plan = [(mode, *kind) for mode in modes for kind in itertools.product(tasks, caches) if mode.has(kind[1])]
    progress.of = len(plan) * len(benches)
    if not progress.of:
        raise ValueError("nothing is left to measure: leave out one of the --skip flags")
    cells = []
    profile = Path(args.profile) if args.profile else None
    if profile is not None and (rank := os.environ.get("RANK")):  # all ranks run what is traced
        profile /= f"rank{rank}"
    for compiled in (False, True):
        compile_model(model, compile_mode(args) if compiled else "none")
        for bench in benches:
            if compiled:
                torch.compiler.reset()  # what was compiled for other sizes
            for mode, task, cached in plan:
                if mode.compiled == compiled:
                    cells.append(bench.cell(mode, task, cached, profile))
                    progress.cell(cells[-1])
                    keep(machine, cells)
    return machine, cells


def compile_mode(args: argparse.Namespace) -> str:
    return args.compile or args.compile_mode or "blocks"


def skipped(mode: "Mode", args: argparse.Namespace) -> bool:
    if mode.compiled and (args.skip_compile_runs or compile_mode(args) == "none"):
        return True
    if mode.captured:
        return args.skip_captured_runs
    if mode.plain and args.skip_plain_attention_runs:
        return True
    return not mode.compiled and args.skip_eager_runs


def load(args: argparse.Namespace, progress: Progress) -> tuple[Any, dict[str, Any], int]:
    """A frozen model, what there is to say of it and the machine, and of how many ids prompts are drawn."""
    import platform
    import time

    import torch

    from fms import __version__
    from fms.models import freeze, get_model
    from fms.utils.serialization.checkpoint import local_path
    from fms.utils.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(args.tokenizer) if args.tokenizer else None
    path = None if args.model_path is None else local_path(args.model_path)
    architecture, variant = args.architecture, args.variant
    if path is None:
        architecture = architecture or "llama"
        variant = variant or ("7b" if architecture == "llama" else None)
    start = time.perf_counter()
    model: Any = freeze(get_model(architecture, variant, path, args.source, args.device_type, args.dtype))
    seconds = time.perf_counter() - start
    weight = model.embedding.weight
    name = str(args.model_path or " ".join(filter(None, (architecture, variant))))
    progress.say(f"{name}: loaded in {seconds:.1f} s" + ("" if path else ", random weights"))
    known = model.config.src_vocab_size
    vocab = known if tokenizer is None else min(tokenizer.vocab_size(), known)
    machine = {
        "model": name,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "ranks": model.comm.size if model.comm else 1,
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "fms": __version__,
        "load_seconds": seconds,
    }
    return model, machine, vocab
