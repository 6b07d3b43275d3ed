"""Few rows through chosen experts: the kernels give what plain operations give."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fms.kernels import experts
from fms.kernels.skinny import activation_kind
from tests.kernels.poison import poison

SHAPES = [(1, 2, 4, 30, 70), (3, 2, 8, 64, 33), (5, 1, 3, 130, 50)]  # rows, experts a row, experts, width, hidden


def given(rows: int, top: int, n: int, width: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.randn(rows, width)
    up, down = torch.randn(n, 2 * hidden, width) / width**0.5, torch.randn(n, width, hidden) / hidden**0.5
    weights = torch.rand(rows, top)
    chosen = torch.stack([torch.randperm(n)[:top] for _ in range(rows)])
    return *(t.to(device, dtype) for t in (x, up, down)), weights.to(device), chosen.to(device)


def wanted(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: Any) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for row, (es, ws) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
        for e, weight in zip(es, ws, strict=True):
            gate, value = (up[e].double() @ x[row].double()).chunk(2)
            y[row] += weight * (down[e].double() @ (activation(gate) * value))
    return y


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str, bound: float, run: Any = experts.launch) -> Tensor:
    tensors = given(*shape, dtype, device)
    for activation in (F.silu, partial(F.gelu, approximate="tanh")):
        got = run(*tensors, activation_kind(activation))
        want = wanted(*tensors, activation)
        assert float((got - want).norm() / want.norm()) < bound
    return got


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference(shape: tuple[int, ...]) -> None:
    check(shape, torch.float32, "cpu", 1e-6, experts.reference)


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter itself
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted(shape: tuple[int, ...], interpreted: torch.device) -> None:
    check(shape, torch.float16, "cpu", 2e-3)


def test_what_is_not_served() -> None:
    tensors = given(3, 2, 4, 16, 8, torch.float32, "cpu")
    assert experts.experts(*tensors, F.silu) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2, 8, 4096, 1792), (8, 8, 32, 1536, 512)])
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = given(*shape, dtype, "cuda")
    poison(*tensors[0].shape, dtype=dtype, device="cuda")
    poison(tensors[4].numel(), tensors[2].shape[2], dtype=dtype, device="cuda")
    first = experts.experts(*tensors, F.silu)
    assert first is not None
    want = wanted(*tensors, F.silu)
    assert float((first - want).norm() / want.norm()) < 1e-2
    for _ in range(1000):
        assert torch.equal(first, experts.experts(*tensors, F.silu))
