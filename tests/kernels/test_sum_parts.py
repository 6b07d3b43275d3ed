"""Parts of several ranks added up: the kernel and its reference against plain sums."""

from typing import Any

import pytest
import torch

from fms.kernels.sum_parts import reference, sum_parts

F32, BF16 = torch.float32, torch.bfloat16


def check(device: Any, size: int, rank: int, n: int, dtype: torch.dtype, wide: torch.dtype) -> None:
    parts = torch.randn(size, n, device=device).to(dtype)
    others = torch.cat((parts[:rank], parts[rank + 1 :]))
    want = torch.zeros(n, device=device)
    for part in parts:
        want += part
    for run in (sum_parts, reference):
        out = torch.full((n,), float("nan"), device=device, dtype=wide)
        run(parts[rank], others, rank, out, 0.25)
        assert torch.equal(out, (want * 0.25).to(wide))


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "rank", "n"), [(2, 0, 4096), (2, 1, 4099), (4, 2, 33), (3, 0, 1), (2, 1, 0)])
def test_parts(interpreted: torch.device, size: int, rank: int, n: int, dtype: torch.dtype) -> None:
    for wide in (F32, dtype):
        check(interpreted, size, rank, n, dtype, wide)


def test_other_types_in_plain_operations() -> None:
    out = torch.empty(5, dtype=torch.float64)
    sum_parts(torch.ones(5, dtype=torch.float64) / 3, torch.ones(1, 5, dtype=torch.float64), 1, out, 0.5)
    assert torch.equal(out, torch.full((5,), (1 + 1 / 3) / 2, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "rank", "n"), [(2, 0, 1 << 20), (2, 1, (1 << 20) + 3), (8, 5, 12345), (3, 0, 1)])
def test_parts_on_a_gpu(size: int, rank: int, n: int, dtype: torch.dtype) -> None:
    for wide in (F32, dtype):
        check("cuda", size, rank, n, dtype, wide)
