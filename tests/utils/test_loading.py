"""Large tensors on their way to another device: the same, by pieces of bounded size."""

from math import prod
from typing import Any

import pytest
import torch

from fms.utils.serialization import loading
from fms.utils.serialization.tables import Part, Stack
from tests.utils.test_tables import Held

PARTS: list[tuple[Part, tuple[slice, ...], int]] = [  # a part, what is kept of it, the rows of its pieces
    (Part("a"), (), 2),
    (Part("a"), (slice(3, 10),), 2),
    (Part("a"), (slice(3, 10), slice(2, 5)), 4),
    (Part("a", rows=torch.tensor([5, 4, 1, 0, 7, 6, 3, 2])), (slice(1, 8),), 2),
    (Part("a", turned=True), (slice(0, 6), slice(4, 12)), 2),
    (Part("row"), (), 12),
    (Stack("a", parts=(Part("a"), Part("a", rows=torch.arange(11, -1, -1)))), (), 1),
    (Stack("a", parts=(Part("a"), Part("a"))), (slice(0, 2), slice(0, 6)), 1),
]


@pytest.mark.parametrize(("part", "index", "rows"), PARTS)
def test_pieces_make_the_whole(part: Part, index: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Held({"a": torch.randn(12, 6), "row": torch.randn(12)})
    whole, sizes = part.read(reader, index), []
    real = type(part).read

    def read(self: Part, *args: Any) -> torch.Tensor:
        found = real(self, *args)
        if self is part:
            sizes.append(found.shape)
        return found

    monkeypatch.setattr(type(part), "read", read)
    monkeypatch.setattr(loading, "PIECE", 48)  # two rows of six numbers
    got = loading._in_pieces(part, torch.device("cpu"), torch.float64, reader, index)
    assert torch.equal(got, whole.double())
    dim = int(part.turned)
    assert {size[dim] for size in sizes[:-1]} <= {rows}
    assert all(prod(size) * 4 <= 48 or size[dim] == 1 for size in sizes)
