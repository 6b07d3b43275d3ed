"""Speed of training a Llama of 1.2 billion parameters on one GPU (sequence 4096, batch 8, bf16 above fp32 weights,
blocks compiled): `fms train`'s own loop, forms of it, and torchtitan 0.2.2, in turn, each in a process of its own.

    python benchmarks/training.py --titan FOLDER_OF_WHEELS --json FILE

`--tiny` is a rehearsal on any machine, a CPU too, of shapes that mean nothing.
"""

import argparse
import atexit
import contextlib
import json
import os
import shutil
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
# what differs from `fms train --mixed_precision bf16 --compile blocks`; the first is that, and torchtitan follows it
FORMS: dict[str, dict[str, Any]] = {
    "fms": {},
    "torchtitan": {},  # its own Trainer and step
    "flash": {"attention": "FLASH_ATTENTION"},
    "autocast": {"autocast": True},
    "tuned": {"env": {"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}},
    "plain loss": {"plain_loss": True},
    "max": {"compile": "max"},
    # 8 billion parameters: weights and the optimizer's states in bf16, as one GPU has room for
    "fms 8b": {"shape": EIGHT, "dtype": "bf16", "batch": 2},
    "torchtitan 8b": {"shape": EIGHT, "dtype": "bf16", "batch": 2},
}
QUICK = "fms,torchtitan,flash,tuned,autocast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default=QUICK, help=f"with commas between, of {', '.join(FORMS)}")
    parser.add_argument("--seconds", type=float, default=90, help="after which a process is ended")
    parser.add_argument("--all_seconds", type=float, default=230, help="after which none is started any more")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--batch", type=int, default=8)
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
        print(json.dumps(rows[-1]), flush=True)
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
    """What a process of its own says of a form."""
    with tempfile.NamedTemporaryFile("r") as said:
        command = [sys.executable, __file__, "--one", form, "--json", said.name, *(["--tiny"] if args.tiny else [])]
        for name in ("warmup", "steps", "batch", "seq_len"):
            command += [f"--{name}", str(getattr(args, name))]
        paths = [
            str(ROOT),
            *([args.unpacked] if form.startswith("torchtitan") else []),
            os.environ.get("PYTHONPATH", ""),
        ]
        env = os.environ | FORMS[form].get("env", {}) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            done = subprocess.run(command, timeout=args.seconds, env=env, capture_output=True, text=True)
        except subprocess.TimeoutExpired as error:
            return {"form": form, "error": f"longer than {args.seconds} s", "tail": str(error.stderr or "")[-1500:]}
        text = said.read()
    return json.loads(text) if text else {"form": form, "error": f"exit {done.returncode}", "tail": done.stderr[-3000:]}


def one(args: argparse.Namespace) -> None:
    form = FORMS[args.one]
    shape = TINY if args.tiny else form.get("shape", FULL)
    args.batch = form.get("batch", args.batch)
    if args.tiny:
        args.seq_len, args.batch = 64, 2
    row: dict[str, Any] = {
        "form": args.one,
        "dtype": form.get("dtype", "fp32"),
        "torch": torch.__version__,
        "batch": args.batch,
        "seq_len": args.seq_len,
    }
    if torch.cuda.is_available():
        row["device"] = torch.cuda.get_device_name()
    try:
        begun = time.perf_counter()
        make = titan if args.one.startswith("torchtitan") else ours
        with contextlib.ExitStack() as stack:
            step, more = make(args, shape, stack)
            row |= more | {"build_s": round(time.perf_counter() - begun, 1)} | timed(step, args, shape)
    except Exception as error:  # whatever it is, the others are still to be timed
        row |= {"error": f"{type(error).__name__}: {error}"[:1500], "trace": traceback.format_exc()[-2500:]}
    args.json.write_text(json.dumps(row))


def timed(step: Callable[[], Any], args: argparse.Namespace, shape: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second over the timed steps together, MFU, peak memory, and where one step's time goes."""
    begun = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - begun
    for _ in range(args.warmup - 1):
        step()
    wait()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    each = []
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
        each.append(time.perf_counter())
    wait()
    seconds = (time.perf_counter() - start) / args.steps
    tokens = args.batch * args.seq_len
    row: dict[str, Any] = {"first_step_s": round(first, 1), "step_ms": round(seconds * 1e3, 2)}
    row |= {"tokens_per_second": round(tokens / seconds, 1), "warmup": args.warmup, "steps": args.steps}
    row["mfu"] = round(tokens / seconds * flops(shape, args.seq_len) / PEAK, 4)
    if torch.cuda.is_available():
        row["allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        with contextlib.suppress(Exception):
            row["kernels_ms"] = kernels(step)
    return row


def flops(shape: dict[str, Any], seq_len: int) -> float:
    """A token: 6 (parameters - embedding) + 12 layers x heads x head_dim x sequence."""
    d, heads = shape["emb_dim"], (shape["nheads"] + shape["kvheads"]) * shape["head_dim"]
    layer = 2 * d * heads + 3 * d * shape["hidden_dim"] + 2 * d
    counted = shape["nlayers"] * layer + d + d * shape["src_vocab_size"]
    return 6 * counted + 12 * shape["nlayers"] * shape["nheads"] * shape["head_dim"] * seq_len


def kernels(step: Callable[[], Any]) -> dict[str, float]:
    """The 25 kernels that take most of a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        wait()
    top = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)[:25]
    return {f"{row.key[:90]} x{row.count}": round(row.self_device_time_total / 1e3, 2) for row in top}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_ids(args: argparse.Namespace, shape: dict[str, Any]) -> Iterator[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(shape["src_vocab_size"], (args.batch, args.seq_len + 1), generator=draw)


# ours


class Tokens:
    """Random rows, in the form of a dataset."""

    def __init__(self, args: argparse.Namespace, shape: dict[str, Any]):
        self.args, self.shape = args, shape

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        for ids in random_ids(self.args, self.shape):
            yield {"input_ids": ids[:, :-1], "labels": ids[:, :-1]}

    def vocab_size(self) -> int:
        return self.shape["src_vocab_size"]


def ours(args: argparse.Namespace, shape: dict[str, Any], stack: contextlib.ExitStack) -> tuple[Callable, dict]:
    from fms.cli.train import find_root
    from fms.distributed.launch import launch
    from fms.training.config import TrainConfig
    from fms.training.loop import Trainer
    from fms.training.metrics import flops_per_token
    from fms.training.signals import Stop

    form = FORMS[args.one]
    more = check_kernels()
    config = TrainConfig(
        architecture="llama",
        variant="3-8b",
        model=shape,
        dataset="mock",
        seq_len=args.seq_len,
        batch_size=args.batch,
        mixed_precision="none" if form.get("autocast") else "bf16",
        compile=form.get("compile", "blocks"),
        dtype=form.get("dtype", "fp32"),
        output=stack.enter_context(tempfile.TemporaryDirectory()),
    )
    device = launch("auto")
    torch.manual_seed(0)
    data = Tokens(args, shape)
    root = find_root(config, device, None, data)
    trainer = Trainer(root, data, config, device)
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

    def step() -> None:
        trainer.one_step(batches, stop)
        more["loss"] = trainer.window  # read at the end, if at all

    return step, {name: value for name, value in more.items() if name != "loss"}


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


# torchtitan: its Trainer and its step, on random rows, without its tokenizer and its data


def titan(args: argparse.Namespace, shape: dict[str, Any], stack: contextlib.ExitStack) -> tuple[Callable, dict]:
    if not torch.cuda.is_available():
        rehearse()
    for name, value in (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", "29511")
    import torchtitan
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.components.lr_scheduler import build_lr_schedulers
    from torchtitan.components.optimizer import build_optimizers
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3.infra.parallelize import parallelize_llama
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer
    from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
    from torchtitan.train import Trainer

    class Rows(BaseDataLoader):
        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            for ids in random_ids(args, shape):
                yield {"input": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    plain = shape["emb_dim"] * 4 * 2 // 3
    size = TransformerModelArgs(
        dim=shape["emb_dim"],
        n_layers=shape["nlayers"],
        n_heads=shape["nheads"],
        n_kv_heads=shape["kvheads"],
        vocab_size=shape["src_vocab_size"],
        multiple_of=1024,
        ffn_dim_multiplier=shape["hidden_dim"] / plain - 0.01,
        rope_theta=500000,
    )
    spec = TrainSpec(
        model_cls=Transformer,
        model_args={"this": size},
        parallelize_fn=parallelize_llama,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=lambda **_: Rows(),
        build_tokenizer_fn=None,
        build_loss_fn=build_cross_entropy_loss,
    )
    register_train_spec("this", spec)
    config = JobConfig()
    config.job.dump_folder = stack.enter_context(tempfile.TemporaryDirectory())
    config.model.name, config.model.flavor = "this", "this"
    config.training.local_batch_size, config.training.seq_len = args.batch, args.seq_len
    config.training.steps = 10_000
    config.training.dtype = "bfloat16" if FORMS[args.one].get("dtype") == "bf16" else "float32"
    config.activation_checkpoint.mode = "none"
    config.compile.enable = True
    config.optimizer.implementation = "fused" if torch.cuda.is_available() else "foreach"
    config.metrics.log_freq = 1_000_000  # it would wait for the GPU
    config.checkpoint.enable = False
    trainer = Trainer(config)
    batches = trainer.batch_generator(trainer.dataloader)
    model = trainer.model_parts[0]
    hidden = model.layers["0"].feed_forward.w1.weight.shape[0]
    if hidden != shape["hidden_dim"]:
        raise ValueError(f"torchtitan made {hidden} hidden channels, not {shape['hidden_dim']}")
    more = {"version": torchtitan.__version__, "parameters": sum(p.numel() for p in model.parameters())}
    more |= {"optimizer": config.optimizer.implementation, "compiled": config.compile.components}

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)

    return step, more


def rehearse() -> None:
    """Let torchtitan take a CPU for its GPU."""
    from types import SimpleNamespace
    from unittest.mock import MagicMock

    import torch._utils as inside

    gpu = MagicMock()
    gpu.get_device_properties.return_value = SimpleNamespace(total_memory=1 << 30)
    gpu.get_device_name.return_value, gpu.memory_stats.return_value = "cpu", {}
    inside._get_available_device_type, inside._get_device_module = lambda: "cpu", lambda kind: gpu


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| form | tokens/s | MFU | ms a step | GB allocated | first step, s |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['form']} | {row['error'][:80]} | | | | |")
            continue
        figures = (f"{row['tokens_per_second']:,.0f}", row["mfu"], row["step_ms"], row.get("allocated_gb", "-"))
        lines.append("| " + " | ".join(map(str, (row["form"], *figures, row["first_step_s"]))) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
