"""What a run tells of itself: a line on the terminal, JSON lines and CSV in its directory, TensorBoard on request."""

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

PEAKS = {  # TFLOP/s of dense bf16, of the data sheets
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "MI300X": 1307,
}
COLUMNS = "step tokens loss eval_loss grad_norm lr seconds tokens_per_second tokens_per_second_per_gpu mfu memory_gb"
Row = dict[str, Any]


def peak_flops(device: torch.device) -> tuple[float, str] | None:
    """FLOP/s that the device could do in bf16, and what it is; none where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((model for model in PEAKS if model in name), None)
    return None if known is None else (PEAKS[known] * 1e12, f"{known}, {PEAKS[known]} TFLOP/s dense bf16")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, else the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def flops_per_token(model: Any, seq_len: int) -> float:
    """Of a training step: 6 for each weight that a token meets, 12 x layers x heads x head_dim x seq_len for attention.

    An embedding is looked up, so it counts only where it is the head too; of a mixture's experts those count that are
    chosen.
    """
    c = model.config
    total = sum(p.numel() for p in model.parameters())
    if not getattr(c, "tie_heads", False):
        total -= c.src_vocab_size * c.emb_dim
    if experts := getattr(c, "num_experts", 0):
        routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        total -= routed * (1 - c.top_k_experts / experts)
    return 6 * total + 12 * c.nlayers * c.nheads * c.head_dim * seq_len


class Metrics:
    """Rows of one run. Only the first rank writes (`output`), and shows (`show`) a line where there is a terminal."""

    def __init__(
        self, output: Path | None, model: nn.Module, seq_len: int, device: torch.device, world: int, board: bool = False
    ):
        self.output, self.world, self.device = output, world, device
        self.flops, self.peak = flops_per_token(model, seq_len), peak_flops(device)
        self.board: Any = None
        if output is not None and board:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("--tensorboard needs its package: pip install tensorboard") from error
            self.board = SummaryWriter(output / "tensorboard")
        self.clock = time.perf_counter()

    def resume(self, step: int) -> None:
        """Forget the rows after `step`, which will be made again."""
        if self.output is None:
            return
        rows = [row for row in read_rows(self.output) if row["step"] <= step]
        (self.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with (self.output / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS.split(), restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def report(self, step: int, tokens: int, steps_tokens: float, **values: float) -> Row:
        """Write what there is to say after `step`; `tokens` are all so far, `steps_tokens` those since the last row."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        speed = steps_tokens / seconds
        row: Row = {"step": step, "tokens": tokens, **values, "seconds": round(seconds, 3)}
        row |= {"tokens_per_second": round(speed, 1), "tokens_per_second_per_gpu": round(speed / self.world, 1)}
        if self.peak is not None:
            row |= {"mfu": round(speed / self.world * self.flops / self.peak[0], 4), "mfu_of": self.peak[1]}
        row["memory_gb"] = round(peak_memory(self.device) / 1e9, 2)
        self.write(row)
        return row

    def pause(self, seconds: float) -> None:
        """Time that was no training."""
        self.clock += seconds

    def write(self, row: Row) -> None:
        if self.output is None:
            return
        with (self.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        with (self.output / "metrics.csv").open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS.split(), restval="", extrasaction="ignore").writerow(row)
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, row["step"])
        words = [f"{name} {row[name]:.5g}" for name in ("loss", "eval_loss", "grad_norm", "lr", "mfu") if name in row]
        if "tokens_per_second" in row:
            words.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        self.say(f"step {row['step']}: {', '.join(words)}")

    def say(self, text: str) -> None:
        if self.output is not None:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_rows(run: Path) -> list[Row]:
    """The rows of a run's directory, or of its metrics.jsonl; half a line at the end is left out."""
    file = run if run.is_file() else run / "metrics.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
