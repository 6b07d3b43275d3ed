"""The next token of each row, on the logits' device. A row draws the same tokens alone, in a batch, or on shards."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fms.modules.tp import Communicator
from fms.utils.serialization.errors import nearest


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


def sampling_of(given: dict[str, Any], defaults: dict[str, Any], arguments: Iterable[str]) -> Sampling:
    """What is given over what a model defaults to. Raises `ValueError` for a name that is neither of `Sampling` nor
    among the other `arguments` of `generate`."""
    known = [f.name for f in fields(Sampling)]
    for name in given:
        if name not in known:
            raise ValueError(f"generate() has no argument {name!r}{nearest(name, [*known, *arguments])}")
    given = {name: value for name, value in given.items() if value is not None}
    values = {name: defaults[name] for name in known if defaults.get(name) is not None} | given
    if "do_sample" not in given and given.keys() - {"repetition_penalty"}:
        values["do_sample"] = True
    return Sampling(**values)


def ends_of(given: int | Sequence[int] | None, defaults: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    """The tokens that end a row: those given, else a model's, else a tokenizer's."""
    if given is None:
        given = defaults.get("eos_token_id")
    if given is None:
        given = tokenizer.eos_token_ids if tokenizer is not None else ()
    return frozenset([given] if isinstance(given, int) else given)


class Share(NamedTuple):
    """Which part of the vocabulary this rank's logits are of: from id `first` on; every rank has at most `size`."""

    comm: Communicator
    first: int
    size: int


def share_of(head: Any) -> Share | None:
    """Which part of the vocabulary a model's head has here; `None`: all of it."""
    rows = getattr(head, "shards", {}).get("weight")
    return None if rows is None else Share(head.comm, rows[0].start, head.share)


def choose(
    logits: Tensor, how: Sampling, rows: Tensor, positions: Tensor, share: Share | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids (b) for logits (b, vocabulary), and whether the logits are fit for use (b): no NaN, no infinite winner.

    `rows` (b) are the rows' numbers, `positions` (b) the places in their sequences that the tokens will have. Of a
    `share` of the vocabulary only candidates are exchanged, and the whole logits where top_p stands without top_k.
    """
    first = 0
    if share is not None:
        first = share.first
        logits = F.pad(logits, (0, share.size - logits.shape[-1]), value=float("-inf"))
    ids = torch.arange(first, first + logits.shape[-1], device=logits.device).expand_as(logits)
    if how.greedy:
        logits, ids = _winners(logits, ids, share)
        return ids[:, 0], logits[:, 0].isfinite()
    logits = logits.float() / how.temperature
    if how.top_k:
        logits, ids = _top(logits, ids, how.top_k)
        if share is not None:
            logits, ids = _top(share.comm.gather(logits), share.comm.gather(ids), how.top_k)
    elif (how.top_p or 1) < 1:
        if share is not None:
            logits, ids, share = share.comm.gather(logits), share.comm.gather(ids), None
        logits, ids = _top(logits, ids, logits.shape[-1])
    if how.top_k:
        share = None  # all ranks have the same candidates now
    best = logits.amax(-1, keepdim=True)
    if share is not None:
        best = share.comm.gather(best).amax(-1, keepdim=True)
    if how.top_p is not None and how.top_p < 1:
        probabilities = logits.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.masked_fill(before >= how.top_p, float("-inf"))
    if how.min_p:
        floor = best + math.log(how.min_p)
        logits = logits.masked_fill(logits < floor, float("-inf"))
    noisy = logits + gumbel(how.seed + rows[:, None], positions[:, None], ids)
    return _winners(noisy, ids, share)[1][:, 0], best[:, 0].isfinite()


def _top(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest, sorted, which top_p needs."""
    logits, places = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return logits, ids.gather(-1, places)


def _winners(scores: Tensor, ids: Tensor, share: Share | None) -> tuple[Tensor, Tensor]:
    """The score and the id (b, 1 each) of the highest score, over all ranks."""
    place = scores.argmax(-1, keepdim=True)
    score, winner = scores.gather(-1, place), ids.gather(-1, place)
    if share is None:
        return score, winner
    pairs = share.comm.gather(torch.cat((score.double(), winner.double()), -1)).unflatten(-1, (-1, 2))  # b ranks 2
    rank = pairs[..., 0].argmax(-1, keepdim=True)
    return pairs[..., 0].gather(-1, rank), pairs[..., 1].gather(-1, rank).long()


def seen_of(prompts: Sequence[Tensor], how: Sampling, vocabulary: int) -> Tensor | None:
    """Which tokens each row of `prompts` (1-D) has, (b, vocabulary), where there is a penalty for them."""
    if how.repetition_penalty == 1:
        return None
    seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=prompts[0].device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    return seen


def penalise(logits: Tensor, seen: Tensor, penalty: float, share: Share | None = None) -> Tensor:
    """Logits, all or of a share, with those of `seen` tokens (b, vocabulary; bool) made less likely."""
    if share is not None:
        seen = seen[:, share.first :][:, : logits.shape[-1]]
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
