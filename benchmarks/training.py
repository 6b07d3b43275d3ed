"""Speed of training Llamas of 1.2 and 8 billion parameters on one GPU and on two (sequence 4096, blocks compiled):
`fms train`'s own loop, forms of it, and torchtitan 0.2.2, in turn, each in processes of its own.

    python benchmarks/training.py --titan FOLDER_OF_WHEELS --json FILE
    python benchmarks/training.py --titan FOLDER_OF_WHEELS --forms "fms 8b fsdp,torchtitan 8b fsdp" --json FILE

`--tiny` is a rehearsal on any machine, a CPU too, of shapes that mean nothing.
"""

import argparse
import atexit
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
PEAK = 989e12  # FLOP/s: dense bf16 of the H100's and H200's data sheets
FULL = {"emb_dim": 2048, "nlayers": 16, "nheads": 32, "kvheads": 8, "head_dim": 64, "hidden_dim": 8192}
FULL |= {"src_vocab_size": 128_256, "max_expected_seq_len": 8192}
EIGHT = FULL | {"emb_dim": 4096, "nlayers": 32, "head_dim": 128, "hidden_dim": 14_336}
TINY = {"emb_dim": 256, "nlayers": 2, "nheads": 4, "kvheads": 2, "head_dim": 64, "hidden_dim": 1024}
TINY |= {"src_vocab_size": 1000, "max_expected_seq_len": 256}
SMALL = 100e9  # bytes: a card of less takes what a form says of small cards
# what differs from `fms train --mixed_precision bf16 --compile blocks`; the first is that, and torchtitan follows it
ONE = {"small": {"batch": 4}}
# weights and the optimizer's states in bf16, as one GPU has room for; as two have where they split each layer
EIGHT_ONE = {"shape": EIGHT, "dtype": "bf16", "batch": 2, "small": {"recompute": "full"}}
EIGHT_TP = {"shape": EIGHT, "dtype": "bf16", "batch": 2, "ranks": 2, "distributed": "tp"}
EIGHT_FSDP = {"shape": EIGHT, "batch": 2, "ranks": 2, "distributed": "fsdp", "small": {"dtype": "bf16", "batch": 1}}
FORMS: dict[str, dict[str, Any]] = {
    "fms": ONE,
    "torchtitan": ONE,  # its own Trainer and step
    "flash": ONE | {"attention": "FLASH_ATTENTION"},
    "autocast": ONE | {"autocast": True},
    "tuned": ONE | {"env": {"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}},
    "plain loss": ONE | {"plain_loss": True},
    "max": ONE | {"compile": "max"},
    "fms fsdp": ONE | {"ranks": 2, "distributed": "fsdp"},
    "torchtitan fsdp": ONE | {"ranks": 2, "distributed": "fsdp"},
    "fms 8b": EIGHT_ONE,
    "torchtitan 8b": EIGHT_ONE,
    "fms 8b fsdp": EIGHT_FSDP,
    "torchtitan 8b fsdp": EIGHT_FSDP,
    "fms 8b tp": EIGHT_TP,  # with sequence parallelism, as torchtitan always has
    "torchtitan 8b tp": EIGHT_TP,
    "fms 8b tp eager": EIGHT_TP | {"compile": "none"},  # torchtitan does not run compiled so with torch 2.13
    "torchtitan 8b tp eager": EIGHT_TP | {"compile": "none"},
}
QUICK = "fms,torchtitan,flash,tuned,autocast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=QUICK, help=f"with commas between, of {', '.join(FORMS)}")
    parser.add_argument("--seconds", type=float, default=90, help="after which a process is ended")
    parser.add_argument("--all_seconds", type=float, default=230, help="after which none is started any more")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--batch", type=int, help="of a rank (default: 8 on one H200, or as the form says)")
    parser.add_argument("--recompute", choices=("none", "full"), help="blocks in the backward (default: the form's)")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--titan", type=Path, help="folder of wheels of torchtitan and what it needs")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    begun, rows = time.perf_counter(), []
    args.unpacked = unpacked(args.titan)
    for form in args.forms.split(","):
        if time.perf_counter() - begun > args.all_seconds:
            rows.append({"form": form, "error": "no time was left"})
        else:
            rows.append(apart(form, args))
        print(json.dumps({name: value for name, value in rows[-1].items() if name != "kernels_ms"}), flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def unpacked(wheels: Path | None) -> str:
    """A directory of what is in a folder's wheels, there until the program ends."""
    if wheels is None:
        return ""
    out = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, out, True)
    for wheel in sorted(wheels.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(out)
    data = Path(out, "datasets")  # torchtitan imports it for data that is not used here
    data.mkdir()
    (data / "__init__.py").write_text("Dataset = load_dataset = None\n")
    (data / "distributed.py").write_text("split_dataset_by_node = None\n")
    return out


def apart(form: str, args: argparse.Namespace) -> dict[str, Any]:
    """What processes of its own say of a form."""
    ranks = FORMS[form].get("ranks", 1)
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    with tempfile.NamedTemporaryFile("r") as said, tempfile.NamedTemporaryFile("w+") as told:
        command = [sys.executable, *many, __file__, "--one", form, "--json", said.name]
        command += ["--tiny"] if args.tiny else []
        for name in ("warmup", "steps", "batch", "seq_len", "recompute"):
            if (value := getattr(args, name)) is not None:
                command += [f"--{name}", str(value)]
        theirs = [args.unpacked] if form.startswith("torchtitan") else []
        paths = [str(ROOT), *theirs, os.environ.get("PYTHONPATH", "")]
        env = os.environ | FORMS[form].get("env", {}) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process = subprocess.Popen(command, env=env, stdout=told, stderr=told, start_new_session=True)
        try:
            code = process.wait(args.seconds)
            error = f"exit {code}"
        except subprocess.TimeoutExpired:
            error = f"longer than {args.seconds} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks too
        process.wait()
        text, tail = said.read(), Path(told.name).read_text(errors="replace")[-3000:]
    return json.loads(text) if text else {"form": form, "error": error, "tail": tail}


def one(args: argparse.Namespace) -> None:
    form = FORMS[args.one]
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < SMALL:
        form = form | form.get("small", {})
    form = {"shape": FULL, "dtype": "fp32", "batch": 8, "recompute": "none", "distributed": "none", "ranks": 1} | form
    form |= {name: value for name in ("batch", "recompute") if (value := getattr(args, name)) is not None}
    if args.tiny:
        form |= {"shape": TINY, "batch": 2}
        args.seq_len = 64
    args.batch = form["batch"]
    row: dict[str, Any] = {"form": args.one, "torch": torch.__version__, "seq_len": args.seq_len}
    row |= {name: form[name] for name in ("dtype", "batch", "recompute", "distributed", "ranks")}
    if torch.cuda.is_available():
        row["device"] = torch.cuda.get_device_name()
    try:
        begun = time.perf_counter()
        make = titan if args.one.startswith("torchtitan") else ours
        with contextlib.ExitStack() as stack:
            step, more = make(args, form, stack)
            row |= more | {"build_s": round(time.perf_counter() - begun, 1)} | timed(step, args, form)
    except Exception as error:  # whatever it is, the others are still to be timed
        row |= {"error": f"{type(error).__name__}: {error}"[:1500], "trace": traceback.format_exc()[-2500:]}
    if int(os.environ.get("RANK", "0")) == 0:
        args.json.write_text(json.dumps(row))


def timed(step: Callable[[], Any], args: argparse.Namespace, form: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second and GPU over the timed steps together, MFU, peak memory, and where one step's time goes."""
    begun = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - begun
    for _ in range(args.warmup - 1):
        step()
    wait()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
    wait()
    seconds = (time.perf_counter() - start) / args.steps
    sharing = form["ranks"] if form["distributed"] == "tp" else 1  # the same tokens
    tokens = args.batch * args.seq_len / sharing
    row: dict[str, Any] = {"first_step_s": round(first, 1), "step_ms": round(seconds * 1e3, 2)}
    row |= {"tokens_per_second_per_gpu": round(tokens / seconds, 1), "warmup": args.warmup, "steps": args.steps}
    row["mfu"] = round(tokens / seconds * flops(form["shape"], args.seq_len) / PEAK, 4)
    if torch.cuda.is_available():
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        with contextlib.suppress(Exception):
            row |= kernels(step)
    return row


def flops(shape: dict[str, Any], seq_len: int) -> float:
    """A token: 6 (parameters - embedding) + 12 layers x heads x head_dim x sequence."""
    d, heads = shape["emb_dim"], (shape["nheads"] + shape["kvheads"]) * shape["head_dim"]
    layer = 2 * d * heads + 3 * d * shape["hidden_dim"] + 2 * d
    counted = shape["nlayers"] * layer + d + d * shape["src_vocab_size"]
    return 6 * counted + 12 * shape["nlayers"] * shape["nheads"] * shape["head_dim"] * seq_len


def kernels(step: Callable[[], Any], steps: int = 3) -> dict[str, Any]:
    """The kernels that take most of a step, how long each stream has some, and where the busiest has none, of several
    steps behind one another."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        wait()
    times: dict[str, float] = {}
    streams: dict[str, float] = {}
    events = sorted((e for e in found.events() if e.device_time_total > 0), key=lambda e: e.time_range.start)
    for event in events:
        ms = event.time_range.elapsed_us() / 1e3 / steps
        for tally, name in ((times, event.name[:150]), (streams, str(event.device_resource_id))):
            tally[name] = tally.get(name, 0) + ms
    waits: dict[str, float] = {}
    busiest = [e for e in events if str(e.device_resource_id) == max(streams, key=lambda name: streams[name])]
    for one, following in itertools.pairwise(busiest):
        gap = (following.time_range.start - one.time_range.end) / 1e3 / steps
        name = f"{following.name[:70]} behind {one.name[:70]}"
        waits[name] = waits.get(name, 0) + max(gap, 0)
    most = {name: round(times[name], 2) for name in sorted(times, key=lambda name: -times[name])[:35]}
    busy = {name: round(ms, 2) for name, ms in streams.items()}
    longest = {name: round(waits[name], 2) for name in sorted(waits, key=lambda name: -waits[name])[:12]}
    every = round(sum(times.values()), 2)
    return {"all_kernels_ms": every, "streams_ms": busy, "waits_ms": longest, "kernels_ms": most}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_ids(args: argparse.Namespace, vocabulary: int, place: int) -> Iterator[torch.Tensor]:
    """Rows of one more token than a sequence, others for each of the ranks that see different data."""
    draw = torch.Generator().manual_seed(place)
    while True:
        yield torch.randint(vocabulary, (args.batch, args.seq_len + 1), generator=draw)


# ours


class Tokens:
    """Random rows, in the form of a dataset."""

    def __init__(self, args: argparse.Namespace, vocabulary: int, place: int):
        self.args, self.vocabulary, self.place = args, vocabulary, place

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        for ids in random_ids(self.args, self.vocabulary, self.place):
            yield {"input_ids": ids[:, :-1], "labels": ids[:, :-1]}

    def vocab_size(self) -> int:
        return self.vocabulary


def ours(args: argparse.Namespace, form: dict[str, Any], stack: contextlib.ExitStack) -> tuple[Callable, dict]:
    from fms.cli.train import find_root
    from fms.distributed.launch import launch
    from fms.distributed.mesh import data_place
    from fms.training.config import TrainConfig
    from fms.training.loop import Trainer
    from fms.training.metrics import flops_per_token
    from fms.training.parallel import mesh_for
    from fms.training.signals import Stop

    shape = form["shape"]
    config = TrainConfig(
        architecture="llama",
        variant="3-8b",
        model=shape,
        dataset="mock",
        seq_len=args.seq_len,
        batch_size=args.batch,
        mixed_precision="none" if form.get("autocast") else "bf16",
        compile=form.get("compile", "blocks"),
        dtype=form["dtype"],
        activation_checkpointing=form["recompute"],
        distributed=form["distributed"],
        sequence_parallel=form["distributed"] == "tp",
        output=stack.enter_context(tempfile.TemporaryDirectory()),
    )
    device = launch("auto")
    more = check_kernels()
    mesh = mesh_for(config, device)
    place = data_place(mesh)
    torch.manual_seed(0)
    data = Tokens(args, shape["src_vocab_size"], place[0])
    root = find_root(config, device, mesh, data)
    trainer = Trainer(root, data, config, device, mesh, place)
    trainer.root.train()
    stack.callback(trainer.close)
    more |= {"flops_agree": abs(flops_per_token(root.model, args.seq_len) / flops(shape, args.seq_len) - 1) < 1e-6}
    more["parameters"] = sum(p.numel() for p in root.parameters())
    if "attention" in form:
        force_attention(form["attention"])
    if form.get("autocast"):
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
    if form.get("plain_loss"):
        from fms.kernels import cross_entropy

        cross_entropy.served = lambda logits: False
    batches, stop = trainer.endless(), Stop()
    return lambda: trainer.one_step(batches, stop), more


def force_attention(kind: str) -> None:
    """Use one kind of attention kernel, if it takes the shapes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fms.training import loop

    @contextlib.contextmanager
    def only(device: torch.device) -> Iterator[None]:
        with sdpa_kernel([getattr(SDPBackend, kind), SDPBackend.MATH], set_priority=True):
            yield

    loop.attention_kernels = only


def check_kernels() -> dict[str, Any]:
    """Whether the parts of the loss that only a GPU runs are right here; what is not is replaced, and that is said."""
    from fms.kernels import cross_entropy as kernels
    from fms.training import cross_entropy as loss

    if not torch.cuda.is_available():
        return {}
    said: dict[str, Any] = {}
    logits = torch.randn(64, 5000, device="cuda").bfloat16()
    labels = torch.randint(5000, (64,), device="cuda")
    wide = logits.float()
    want = F.cross_entropy(wide, labels, reduction="sum")
    try:
        top, sums, right = kernels.tally(logits, labels)
        log_sum = sums.log() + top
        torch.testing.assert_close((log_sum - right).sum(), want, rtol=1e-4, atol=1e-3)
        slope = wide.softmax(1)
        slope[torch.arange(64), labels] -= 1
        torch.testing.assert_close(kernels.slope_(logits.clone(), labels, log_sum).float(), slope, rtol=2e-2, atol=1e-4)
        said["loss_kernels"] = "right"
    except Exception as error:
        said["loss_kernels"] = f"{type(error).__name__}: {error}"[:500]
        kernels.served = lambda logits: False
    try:
        a, b = torch.randn(128, 64, device="cuda").bfloat16(), torch.randn(64, 32, device="cuda").bfloat16()
        to = torch.ones(128, 32, device="cuda")
        loss._add_product(to, a, b)
        torch.testing.assert_close(to, 1 + a.float() @ b.float(), rtol=1e-4, atol=1e-4)
        said["wide_products"] = "right"
    except Exception as error:
        said["wide_products"] = f"{type(error).__name__}: {error}"[:500]

        def plain(to: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
            to += a @ b

        loss._add_product = plain
    return said


def titan(args: argparse.Namespace, form: dict[str, Any], stack: contextlib.ExitStack) -> tuple[Callable, dict]:
    from titan import build  # beside this file

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    return build(form, args.seq_len, folder, lambda place: random_ids(args, form["shape"]["src_vocab_size"], place))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| form | tokens/s/GPU | MFU | ms a step | GB allocated | first step, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['form']} | {row['error'][:80]} | | | | |")
            continue
        figures = (f"{row['tokens_per_second_per_gpu']:,.0f}", row["mfu"], row["step_ms"], row.get("allocated_gb", "-"))
        lines.append("| " + " | ".join(map(str, (row["form"], *figures, row["first_step_s"]))) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
