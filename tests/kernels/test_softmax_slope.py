"""The kernels of the cross-entropy against plain operations in fp32, of sizes that no block divides."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fms.kernels import cross_entropy
from fms.kernels.cross_entropy import slope_, tally


def case(n: int, size: int, dtype: torch.dtype, device: Any) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, size, generator=draw) * 8).to(device, dtype)
    labels = torch.randint(-1, size, (n,), generator=draw)
    labels[0], labels[1] = -1, size - 1
    return logits, labels.to(device)


def check(n: int, size: int, dtype: torch.dtype, factor: float, device: Any) -> None:
    logits, labels = case(n, size, dtype, device)
    wide = logits.float() * factor
    top, total, right = tally(logits, labels, factor)
    torch.testing.assert_close(top, wide.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(total.log() + top, wide.logsumexp(1), rtol=1e-6, atol=1e-6)
    rows = torch.arange(n, device=device)
    torch.testing.assert_close(right, wide[rows, labels].where(labels >= 0, 0), rtol=0, atol=0)
    log_sum = wide.logsumexp(1)
    log_sum[-1] = torch.inf
    labels[-1] = -1
    want = (wide - log_sum[:, None]).exp()
    want[rows, labels] -= (labels >= 0).float()
    got = slope_(logits, labels, log_sum, factor)
    assert got is logits
    near: dict[str, float] = {"rtol": 1e-2, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(got.float(), want * factor, **near)
    assert not got[-1].any()


SIZES = [(3, 7), (5, cross_entropy.BLOCK + 3)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "size"), SIZES)
def test_plain(n: int, size: int, dtype: torch.dtype, factor: float) -> None:
    check(n, size, dtype, factor, "cpu")


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "size"), SIZES)
def test_kernels(n: int, size: int, dtype: torch.dtype, factor: float, interpreted: torch.device) -> None:
    check(n, size, dtype, factor, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    for n, size in (*SIZES, (300, 128_256)):
        for factor in (1.0, 0.25):
            check(n, size, dtype, factor, "cuda")
