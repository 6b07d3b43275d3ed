"""Figures of a benchmark as text: Markdown tables, and lines of CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from fms.utils.benchmark import BOTH, CAPTURED, COMPILED, EAGER, PLAIN, Cell

COLUMNS = {
    "single token, cached": ("single", True),
    "single token, uncached": ("single", False),
    "end to end, cached": ("e2e", True),
    "end to end, uncached": ("e2e", False),
}
GAINS = (
    ("a CUDA graph", EAGER, CAPTURED),
    ("compiling", EAGER, COMPILED),
    ("compiling, in a CUDA graph", CAPTURED, BOTH),
    ("SDPA over plain attention", PLAIN, EAGER),
)


def tables(machine: dict[str, Any], cells: Sequence[Cell]) -> str:
    """All that was found, for people."""
    new = cells[0].new_tokens
    where = f"{machine['ranks']} x {machine['device']}, torch {machine['torch']}"
    parts = [
        f"## {machine['model']}, {machine['dtype']}\n\n{where}; {new} new tokens; memory is read at "
        f"{machine['bandwidth_gb_s']:.1f} GB/s; compiled: {machine['compile']}.",
        "### Milliseconds a token\n\n" + table(cells, lambda c: number(c.ms) or c.note),
        "### Milliseconds until the first token\n\n" + table(cells, lambda c: number(c.first)),
        "### Tokens a second, of all rows\n\n" + table(cells, lambda c: number(c.tokens_per_second)),
        "### Share of the bandwidth limit\n\n" + table(cells, lambda c: None if c.share is None else f"{c.share:.0%}"),
        "### Peak memory, GB: allocated / reserved\n\n" + table(cells, memory),
        "### What it gains\n\n" + gains(cells),
        "### Seconds of warm-up, compiling included\n\n" + table(cells, lambda c: number(c.warm_up)),
        "### Compared with eager results\n\n" + table(cells, lambda c: c.check),
    ]
    return "\n\n".join(part for part in parts if not part.endswith("\n")) + "\n"


def table(cells: Sequence[Cell], show: Callable[[Cell], str | None]) -> str:
    """A row a batch, prompt and mode that has something to show; nothing if none has."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for cell in cells:
        if text := show(cell):
            column = next(name for name, kind in COLUMNS.items() if kind == (cell.task, cell.cached))
            rows.setdefault((str(cell.batch_size), str(cell.seq_len), cell.mode), {})[column] = text
    return markdown(("batch", "prompt", "mode"), rows)


def gains(cells: Sequence[Cell]) -> str:
    """How many times faster."""
    found = {(c.batch_size, c.seq_len, c.mode, c.task, c.cached): c.ms for c in cells}
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for batch, length in dict.fromkeys((c.batch_size, c.seq_len) for c in cells):
        for name, slow, fast in GAINS:
            for column, kind in COLUMNS.items():
                one, other = (found.get((batch, length, mode.name, *kind)) for mode in (slow, fast))
                if one and other:
                    rows.setdefault((str(batch), str(length), name), {})[column] = f"{one / other:.2f}x"
    return markdown(("batch", "prompt", "by"), rows)


def markdown(names: Sequence[str], rows: dict[tuple[str, ...], dict[str, str]]) -> str:
    """Rows by batch and prompt; those of one size stay in their order. No rows: nothing."""
    if not rows:
        return ""
    shown = [column for column in COLUMNS if any(column in row for row in rows.values())]
    lines = [[*names, *shown], ["---:"] * (len(names) - 1) + ["---"] + ["---:"] * len(shown)]
    for key, row in sorted(rows.items(), key=lambda row: (int(row[0][0]), int(row[0][1]))):
        lines.append([*key, *(row.get(column, "") for column in shown)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory(cell: Cell) -> str | None:
    if cell.allocated is None or cell.reserved is None:
        return None
    return f"{cell.allocated / 1e9:.2f} / {cell.reserved / 1e9:.2f}"


def number(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.2g}" if value < 1 else f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def csv_lines(cells: Sequence[Cell]) -> str:
    """A line a cell, all its fields; the repeats with spaces between."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Cell)], lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        writer.writerow(asdict(cell) | {"repeats": " ".join(map(str, cell.repeats))})
    return out.getvalue()
