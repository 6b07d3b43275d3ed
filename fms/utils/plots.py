"""Figures of a benchmark as charts, by matplotlib, which is imported when a chart is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fms.utils.benchmark import Cell
from fms.utils.figures import COLUMNS

STYLES = ("-", "--", ":", "-.")


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files. Raises `ImportError` that says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("charts need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(cells: Sequence[Cell], directory: Path) -> list[Path]:
    """Write PNG charts: bars of all cells, latency by prompt length and, where they are known, memory by prompt length
    and latency by what a token reads; none where no cell has a figure."""
    if not _modes(cells):
        return []
    directory.mkdir(parents=True, exist_ok=True)
    drawn = {"cells": _bars(cells), "latency": _lines(cells, "ms", 1.0, "ms a token")}
    if any(cell.reserved for cell in cells):
        drawn["memory"] = _lines(cells, "reserved", 1e9, "GB reserved at the peak")
    if any(cell.bytes and cell.share for cell in cells):
        drawn["bytes"] = _bytes(cells)
    files = []
    for name, figure in drawn.items():
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
        pyplot().close(figure)
    return files


def _bars(cells: Sequence[Cell]) -> Any:
    """For each size a panel, for each column a group, for each mode a bar; logarithmic, as they differ by orders."""
    sizes = list(dict.fromkeys((c.batch_size, c.seq_len) for c in cells))
    modes, columns = _modes(cells), _columns(cells)
    figure, panels = pyplot().subplots(
        len(sizes), 1, figsize=(11, 3.2 * len(sizes)), squeeze=False, layout="constrained"
    )
    for panel, size in zip(panels[:, 0], sizes, strict=True):
        found = {(c.mode, c.task, c.cached): c.ms for c in cells if (c.batch_size, c.seq_len) == size}
        width = 0.8 / len(modes)
        for i, mode in enumerate(modes):
            bars = [(place, found.get((mode, *kind))) for place, kind in enumerate(columns.values())]
            there = [(place + (i - (len(modes) - 1) / 2) * width, ms) for place, ms in bars if ms is not None]
            if not there:
                continue
            drawn = panel.bar([at for at, _ in there], [ms for _, ms in there], width, label=mode, color=f"C{i}")
            panel.bar_label(drawn, fmt="%.3g", fontsize=7)
        panel.set_xticks(range(len(columns)), list(columns))
        panel.set_xlim(-0.5, len(columns) - 0.5)
        known = [ms for ms in found.values() if ms is not None] or [1.0]
        limits = min(known) / 2, max(known) * 1.5  # room for the number on the highest
        panel.set(yscale="log", ylim=limits, ylabel="ms a token", title=f"batch {size[0]}, prompt {size[1]}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}" if limits[1] < 10 * limits[0] else "")
    _legend(figure)
    return figure


def _lines(cells: Sequence[Cell], field: str, unit: float, label: str) -> Any:
    """For each column a panel, for each mode a colour, for each batch a kind of line."""
    modes, columns, batches = _modes(cells), _columns(cells), sorted({cell.batch_size for cell in cells})
    across, down = min(len(columns), 2), (len(columns) + 1) // 2
    figure, panels = pyplot().subplots(
        down, across, figsize=(6 * across, 3.5 * down), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(columns) :]:
        panel.remove()
    for panel, (name, kind) in zip(panels.flat, columns.items(), strict=False):
        lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for cell in cells:
            if (cell.task, cell.cached) == kind and (value := getattr(cell, field)) is not None:
                lines.setdefault((cell.mode, cell.batch_size), []).append((cell.seq_len, value / unit))
        for (mode, batch), points in lines.items():
            style = {"color": f"C{modes.index(mode)}", "linestyle": STYLES[batches.index(batch) % len(STYLES)]}
            panel.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{mode}, batch {batch}", **style)
        highest = max((value for points in lines.values() for _, value in points), default=1.0)
        panel.set(title=name, xlabel="tokens of the prompt", ylabel=label, ylim=(0, 1.1 * highest))
    _legend(figure)
    return figure


def _bytes(cells: Sequence[Cell]) -> Any:
    """Latency of cached cells of all sizes by what a token reads, for each mode a colour, beside the limit."""
    modes, figure = _modes(cells), pyplot().figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    known = sorted((c.bytes / 1e9, c.ms * c.share, c.ms, c.task, c.mode) for c in cells if c.ms and c.bytes and c.share)
    panel.plot([0, known[-1][0]], [0, known[-1][1]], color="0.6", label="the bandwidth limit")
    for mode in modes:
        for name, task, marker in (("single token", "single", "o"), ("end to end", "e2e", "^")):
            points = [(read, ms) for read, _, ms, *kind in known if kind == [task, mode]]
            if points:
                style = {"marker": marker, "color": f"C{modes.index(mode)}"}
                panel.scatter(*zip(*points, strict=True), label=f"{mode}, {name}", **style)
    panel.set(xlabel="GB that a token reads", ylabel="ms a token", xlim=(0, None), ylim=(0, None), title="cached")
    _legend(figure)
    return figure


def _legend(figure: Any) -> None:
    """One for all panels, beside them."""
    named = [dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True)) for panel in figure.axes]
    known = {label: handle for labels in named for label, handle in labels.items()}
    if known:
        figure.legend(known.values(), known, loc="outside right upper", fontsize=8, handlelength=4)


def _modes(cells: Sequence[Cell]) -> list[str]:
    """Those that have a figure."""
    return list(dict.fromkeys(cell.mode for cell in cells if cell.ms is not None))


def _columns(cells: Sequence[Cell]) -> dict[str, Any]:
    """Those that have a figure."""
    there = {(cell.task, cell.cached) for cell in cells if cell.ms is not None}
    return {name: kind for name, kind in COLUMNS.items() if kind in there}
