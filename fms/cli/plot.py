"""`fms plot`: loss and speed of runs as a picture."""

import argparse
from pathlib import Path
from typing import Any

from fms.cli import flags


def add_flags(parser: Any) -> None:
    parser.add_argument(
        "runs", nargs="+", type=flags.path, metavar="RUN", help="output directories of `fms train`, or a metrics.jsonl"
    )
    parser.add_argument("--out", type=flags.path, default="runs.png", metavar="FILE", help="(default: runs.png)")
    flags.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    from fms.training.metrics import read_rows

    runs = {}
    for name in args.runs:
        runs[name] = read_rows(Path(name))
        if not runs[name]:
            raise ValueError(f"{name}: no rows of metrics.jsonl in it")
    draw(runs, Path(args.out))
    print(args.out)
    return 0


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Two panels over the steps: loss, held-out loss dashed, and tokens a second."""
    from fms.utils.plots import pyplot

    figure, (losses, speeds) = pyplot().subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for number, (name, rows) in enumerate(runs.items()):
        colour = f"C{number}"
        lines = ((losses, "loss", "-", name), (losses, "eval_loss", "--", f"{name}, held out"))
        for panel, field, style, label in (*lines, (speeds, "tokens_per_second", "-", name)):
            points = [(row["step"], row[field]) for row in rows if field in row]
            if points:
                panel.plot(*zip(*points, strict=True), style, color=colour, label=label)
    losses.set(ylabel="nats a token")
    speeds.set(ylabel="tokens/s", xlabel="step", ylim=(0, None))
    losses.legend(fontsize=8)
    figure.savefig(out, dpi=150)
    pyplot().close(figure)
