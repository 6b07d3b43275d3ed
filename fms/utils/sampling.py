"""The next token of each row, on the logits' device. A row draws the same tokens alone, in a batch, or on shards."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose. Without `do_sample` it is the likeliest token; the penalty applies in both cases.

    `top_k` keeps the k likeliest, `top_p` the fewest that reach this probability together (Holtzman et al. 2019,
    arXiv 1904.09751), `min_p` those at least this share as likely as the likeliest (Nguyen et al. 2024,
    arXiv 2407.01082). `repetition_penalty` divides positive and multiplies negative logits of tokens seen
    (Keskar et al. 2019, arXiv 1909.05858). Row i draws by `seed + i`.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative (0: no limit)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0


def choose(logits: Tensor, how: Sampling, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (b) for logits (b, vocabulary), and whether the logits are fit for use (b): no NaN, no infinite winner.

    `rows` (b) are the rows' numbers, `positions` (b) the places in their sequences that the tokens will have.
    """
    if how.greedy:
        best, ids = logits.max(-1)
        return ids, best.isfinite()
    logits = logits.float() / how.temperature
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    if how.top_k or (how.top_p or 1) < 1:
        k = min(how.top_k or len(vocabulary), len(vocabulary))
        logits, ids = logits.topk(k, dim=-1)  # sorted, which top_p needs
    else:
        ids = vocabulary.expand_as(logits)
    best = logits.amax(-1)
    if how.top_p is not None and how.top_p < 1:
        probabilities = logits.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.masked_fill(before >= how.top_p, float("-inf"))
    if how.min_p:
        floor = best[:, None] + torch.tensor(how.min_p, device=logits.device).log()
        logits = logits.masked_fill(logits < floor, float("-inf"))
    noisy = logits + gumbel(how.seed + rows[:, None], positions[:, None], ids)
    return ids.gather(-1, noisy.argmax(-1, keepdim=True))[:, 0], best.isfinite()


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits with those of `seen` tokens (b, vocabulary; bool) made less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def gumbel(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise that is a function of (seed, position, token) alone: the winner of logits + noise is a sample of
    their softmax (Gumbel-max), and every process that computes one draws the same."""
    bits = _mix(_mix(_mix(seeds.long()) ^ positions.long()) ^ ids.long())
    uniform = ((bits & 0xFFFFFF).double() + 0.5) / 2**24  # never 0 or 1
    return -(-uniform.log()).log().float()


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (murmur3's constants), in int64 so that every device computes the same."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
