"""The benchmark on several ranks: results that are right, shares of what a token reads, and agreement on memory."""

from typing import Any

import pytest
import torch

from fms.models import freeze, get_model
from fms.utils import benchmark
from fms.utils.benchmark import EAGER, PLAIN, Bench, Cell
from fms.utils.figures import COLUMNS
from fms.utils.measure import step_bytes

SHAPE: dict[str, Any] = {"nlayers": 2, "src_vocab_size": 256}


def bench_of(mesh: Any) -> Bench:
    return Bench(freeze(get_model("llama", "micro", distributed_strategy="tp", group=mesh, **SHAPE)), 2, 9, 4)


def cells(mesh: Any) -> tuple[list[Cell], torch.Tensor]:
    bench = bench_of(mesh)
    kinds = [(mode, *kind) for mode in (EAGER, PLAIN) for kind in COLUMNS.values() if mode.has(kind[1])]
    return [bench.cell(*kind) for kind in kinds], bench.expected[1]


def short_on_one_rank(mesh: Any) -> tuple[str, bool]:
    """Where no collective is under way: in one, the others could only wait for it."""
    bench, peak = bench_of(mesh), benchmark.peak

    def short(device: torch.device) -> tuple[None, None]:
        if mesh.get_local_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return None, None

    benchmark.peak = short
    try:
        note = bench.cell(EAGER, "e2e", True).note
    finally:
        benchmark.peak = peak
    return note, bench.cell(EAGER, "e2e", False).ms is not None


@pytest.mark.parametrize("size", [1, 2])
def test_cells_are_right_and_read_a_share(ranks: Any, size: int) -> None:
    whole = step_bytes(freeze(get_model("llama", "micro", **SHAPE)), 2, 10)
    results = ranks.run(size, cells)
    for found, tokens in results:
        assert [cell.check for cell in found if cell.check not in ("same", "near")] == []
        assert torch.equal(tokens, results[0][1])
        assert found[0].bytes == pytest.approx(whole / size, rel=0.01)  # norms are on every rank


def test_all_ranks_know_that_one_is_out_of_memory(ranks: Any) -> None:
    assert ranks.run(2, short_on_one_rank) == [("out of memory", True)] * 2
