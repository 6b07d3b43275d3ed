"""Training with bf16 copies: the one kernel of a step against PyTorch's AdamW, and runs with it and without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fms.kernels import adamw
from fms.training.copies import Copies
from fms.training.optim import clip, make_optimizer, step_at_once, steps_at_once
from tests.training.runs import settings, small_model, trainer
from tests.training.test_loop import losses


def check_steps(device: torch.device, most: float) -> None:
    """Against PyTorch's on gradients of the same bits."""
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(37, 130), nn.LayerNorm(130), nn.Linear(130, 16, bias=False)).to(device)
    peer = nn.Sequential(nn.Linear(37, 130), nn.LayerNorm(130), nn.Linear(130, 16, bias=False)).to(device)
    peer.load_state_dict(root.state_dict())
    copies, ours, theirs = Copies(root), make_optimizer(root, 1e-2, 0.1), make_optimizer(peer, 1e-2, 0.1)
    assert steps_at_once(ours)
    for n in range(4):
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 1e-2 / (n + 1)
        for p, q in zip(root.parameters(), peer.parameters(), strict=True):
            gradient = torch.randn(p.shape, device=device).bfloat16()
            if n == 2:
                gradient.view(-1)[0] = float("inf")
            if n == 1:  # added up before
                p.grad = gradient.float()
            else:
                copies.made[p].grad = gradient
            q.grad = gradient.float()
        norm = step_at_once(ours, most, copies.made)
        torch.testing.assert_close(norm, clip(theirs, most), rtol=1e-5, atol=0)
        ours.zero_grad()
        if n != 2:
            theirs.step()
        for p, q in zip(root.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            for name, value in theirs.state[q].items():
                torch.testing.assert_close(ours.state[p][name], value, rtol=1e-5, atol=1e-7)
            rounding = 0 if device.type == "cuda" else 1 / 128  # Triton's interpreter cuts off
            torch.testing.assert_close(copies.made[p], p.bfloat16(), rtol=rounding, atol=0)
            assert copies.made[p].grad is None


@pytest.mark.parametrize("most", [0.0, 0.5])
def test_a_step_is_that_of_adamw(interpreted: torch.device, most: float) -> None:
    check_steps(interpreted, most)


def test_whole_numbers_are_given_as_others(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of settings may have them: two groups of one size share what is compiled."""
    given: list[Any] = []
    monkeypatch.setattr(adamw, "start", lambda kernel, tensors, numbers, sizes, key: given.append(numbers))
    model = nn.Linear(4, 4)
    optimizer = make_optimizer(model, 1e-2, weight_decay=0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step_at_once(optimizer, 0, {})
    assert [{type(number) for number in numbers[1:]} for numbers in given] == [{float}, {float}]


@pytest.mark.gpu
@pytest.mark.parametrize("most", [0.0, 0.5])
def test_a_step_on_a_gpu(most: float) -> None:
    check_steps(torch.device("cuda"), most)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_the_same_with_the_kernel(interpreted: Any, accumulate: int, tmp_path: Path) -> None:
    """Interrupted by its end in the middle, too: what is read is used."""
    config = {"mixed_precision": "bf16", "accumulate": accumulate, "checkpoint_steps": 2}
    plain = trainer(settings(tmp_path / "plain", steps=4, **config), small_model(tie_heads=True))
    plain.fused = False
    plain.run()
    for steps in (2, 4):
        run = trainer(settings(tmp_path / "fused", steps=steps, **config), small_model(tie_heads=True))
        assert run.fused
        run.run()
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_a_parameter_that_comes_later(interpreted: Any) -> None:
    """Its means are younger than the others', or there is none at all."""
    pairs = [[nn.Parameter(torch.ones(5)) for _ in "ab"] for _ in "xy"]
    ours, theirs = (make_optimizer(nn.ParameterList(pair), 1e-2) for pair in pairs)
    assert step_at_once(ours, 1.0, {}) == 0
    for n in range(4):
        for pair in pairs:
            for p in pair[n % 2 :]:
                p.grad = torch.full((5,), 0.1 * (n + 1))
        step_at_once(ours, 1.0, {})
        clip(theirs, 1.0)
        theirs.step()
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-5, atol=1e-6)
