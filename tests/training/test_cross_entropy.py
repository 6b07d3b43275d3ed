"""Cross-entropy in chunks equals torch's over whole logits: the loss and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fms.modules.head import Head
from fms.training.cross_entropy import head_loss
from fms.training.loss import IGNORED


def case(bias: bool, scaling: float = 1.0) -> tuple[Tensor, Head, Tensor]:
    torch.manual_seed(0)
    head = Head(12, 31, scaling=scaling, bias=bias).double()
    labels = torch.randint(31, (3, 7))
    labels[0, :4] = IGNORED
    return torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True), head, labels


def plain(h: Tensor, head: Head, labels: Tensor) -> Tensor:
    return functional.cross_entropy(head(h).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("elements", [1, 31 * 4, 1 << 20], ids=["a token", "4 tokens", "all"])
@pytest.mark.parametrize(("bias", "scaling"), [(False, 1.0), (True, 4.0)])
def test_equals_torch(elements: int, bias: bool, scaling: float) -> None:
    h, head, labels = case(bias, scaling)
    want = plain(h, head, labels)
    inputs = [h, *head.parameters()]
    gradients = torch.autograd.grad(3 * want, inputs)
    got = head_loss(h, head, labels, elements)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(torch.autograd.grad(3 * got, inputs), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_no_label_counts() -> None:
    h, head, labels = case(True)
    loss = head_loss(h, head, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert h.grad is not None
    assert not h.grad.any()


def test_frozen_head_and_no_gradient() -> None:
    h, head, labels = case(False)
    head.requires_grad_(False)
    head_loss(h, head, labels, 40).backward()
    assert head.weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(head_loss(h, head, labels, 40), plain(h, head, labels))


def test_bf16_under_autocast_is_near() -> None:
    torch.manual_seed(0)
    head, h, labels = Head(32, 64), torch.randn(2, 9, 32, requires_grad=True), torch.randint(64, (2, 9))
    want = plain(h, head, labels)
    (gradient,) = torch.autograd.grad(want, [head.weight])
    with torch.autocast("cpu", torch.bfloat16):
        got = head_loss(h, head, labels, 64 * 5)
    got.backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    torch.testing.assert_close(head.weight.grad, gradient, rtol=0.1, atol=0.05)
