"""Sampling: transformers' filters, the right distribution, and noise that depends on nothing but its three numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fms.utils.sampling import Sampling, choose, gumbel, penalise

ROWS, DRAWS, VOCABULARY = 4, 20_000, 12


def draws(logits: Tensor, n: int, **how: Any) -> Tensor:
    """`n` tokens for one row of logits, at positions 0 to n - 1."""
    rows = torch.zeros(n, dtype=torch.long)
    tokens, fit = choose(logits.expand(n, -1), Sampling(do_sample=True, **how), rows, torch.arange(n))
    assert fit.all()
    return tokens


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """The statistic, in standard deviations from its mean; cells that few draws are expected in count as one."""
    rare = expected < 5
    counts, expected = (torch.cat((t[~rare], t[rare].sum()[None])) for t in (counts.double(), expected.double()))
    keep = expected > 0
    freedom = int(keep.sum()) - 1
    return float(((counts - expected)[keep] ** 2 / expected[keep]).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_distributed_as_the_softmax(seed: int, temperature: float) -> None:
    logits = torch.randn(VOCABULARY) * 2
    counts = draws(logits, DRAWS, temperature=temperature, seed=seed).bincount(minlength=VOCABULARY)
    assert chi_square(counts, (logits / temperature).softmax(0) * DRAWS) < 4


def test_the_test_of_distribution_can_fail() -> None:
    logits = torch.randn(VOCABULARY) * 2
    counts = draws(logits, DRAWS).bincount(minlength=VOCABULARY)
    assert chi_square(counts, (logits / 1.2).softmax(0) * DRAWS) > 10


@pytest.mark.parametrize("along", ["positions", "seeds", "neighbouring positions and seeds"])
def test_draws_are_independent(along: str) -> None:
    """Pairs of consecutive draws are distributed as pairs are, whichever number counts up."""
    n, vocabulary = 60_000, 5
    steps, zeros = torch.arange(n), torch.zeros(n, dtype=torch.long)
    rows = steps if along != "positions" else zeros
    positions = steps if along != "seeds" else zeros
    tokens, _ = choose(torch.zeros(n, vocabulary), Sampling(do_sample=True), rows, positions)
    pairs = tokens[:-1] * vocabulary + tokens[1:]
    expected = torch.full((vocabulary**2,), (n - 1) / vocabulary**2)
    assert chi_square(pairs.bincount(minlength=vocabulary**2), expected) < 4


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    seeds, positions, ids = torch.tensor([[3], [4]]), torch.tensor([[7], [0]]), torch.arange(1000).expand(2, -1)
    noise = gumbel(seeds, positions, ids)
    order = torch.randperm(1000)
    assert torch.equal(gumbel(seeds, positions, ids[:, order]), noise[:, order])
    assert torch.equal(gumbel(seeds[1:], positions[1:], ids[1:, 500:]), noise[1:, 500:])
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(gumbel(seeds, positions, ids), noise)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.1  # Euler's constant
    for other in (gumbel(seeds + 1, positions, ids), gumbel(seeds, positions + 1, ids)):
        assert (other == noise).float().mean() < 0.01
    # pinned: a seed gives the same tokens in every version and on every device
    assert draws(torch.zeros(100), 8).tolist() == [85, 69, 72, 2, 47, 0, 57, 10]


@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.9}], ids=str)
def test_a_row_draws_the_same_alone_and_in_a_batch(how: dict) -> None:
    logits, positions = torch.randn(ROWS, VOCABULARY), torch.tensor([3, 0, 12, 7])
    together, _ = choose(logits, Sampling(do_sample=True, seed=5, **how), torch.arange(ROWS), positions)
    for i in range(ROWS):
        alone = Sampling(do_sample=True, seed=5 + i, **how)
        token, _ = choose(logits[i : i + 1], alone, torch.tensor([0]), positions[i : i + 1])
        assert token == together[i]


FILTERS = [
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 0.4},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.7},
    {"top_k": 6, "top_p": 0.95, "min_p": 0.2},
]


@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(how: dict) -> None:
    from transformers.generation import logits_process

    classes = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}
    logits = torch.randn(VOCABULARY) * 3
    want = logits[None] / 3.0  # their order: temperature, top_k, top_p, min_p
    for name, value in how.items():
        want = getattr(logits_process, classes[name])(value)(torch.zeros(1, 1, dtype=torch.long), want)
    kept = want[0].isfinite()
    counts = draws(logits, DRAWS, temperature=3.0, **how).bincount(minlength=VOCABULARY)
    assert torch.equal(counts > 0, kept)
    if kept.sum() > 1:
        assert chi_square(counts, want[0].softmax(0) * DRAWS) < 4


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits, ids = torch.randn(ROWS, VOCABULARY), torch.randint(VOCABULARY, (ROWS, 5))
    seen = torch.zeros(ROWS, VOCABULARY, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(penalise(logits, seen, penalty), RepetitionPenaltyLogitsProcessor(penalty)(ids, logits))


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.0, "do_sample": True}, {"top_k": 1, "do_sample": True}], ids=["", "zero", "one"]
)
def test_greedy(how: dict) -> None:
    logits = torch.randn(ROWS, VOCABULARY)
    tokens, fit = choose(logits, Sampling(**how), torch.arange(ROWS), torch.arange(ROWS))
    assert torch.equal(tokens, logits.argmax(-1))
    assert fit.all()


@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 3}, {"do_sample": True, "top_p": 0.5}]
)
def test_logits_that_are_not_finite_are_told_of(how: dict) -> None:
    bad = [[0.0, math.nan, 1.0, 2.0], [0.0, math.inf, 1.0, 2.0], [-math.inf] * 4, [0.0, -math.inf, 1.0, 2.0], [0.0] * 4]
    _, fit = choose(torch.tensor(bad), Sampling(**how), torch.arange(5), torch.arange(5))
    assert fit.tolist() == [False, False, False, True, True]  # a token may be ruled out by minus infinity


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must lie in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p=1.5 must lie in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
    ],
)
def test_errors(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**how)
