"""{likeliest token + what follows}: the end of a decode step that the host takes no part in."""

from typing import NamedTuple

import torch
from torch import Tensor

from fms.kernels.launching import machine, power, start
from fms.kernels.sum_add import BLOCKS, FLAGS, ROWS, Peers, meeting

PARTS = 64  # programs that share a row's vocabulary


class Rows(NamedTuple):
    """Where the rows of a batch stand: int64 tensors (b, 1) but for `tokens` (b), `eos` (any number) and the scratch.

    `tokens` were chosen last, -1 where logits were not finite; `fed` go in next; `lengths` are how many tokens the
    cache holds, `ends` how many a row may have; `going` is 1, or 0 from a row's end on; `eos` are tokens that end one.
    """

    tokens: Tensor
    fed: Tensor
    lengths: Tensor
    going: Tensor
    ends: Tensor
    eos: Tensor
    best: Tensor
    place: Tensor
    counts: Tensor


def make_rows(b: int, eos: list[int], device: torch.device) -> Rows:
    def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    eos_ids = torch.tensor(eos, dtype=torch.long, device=device)
    scratch = zeros(b, PARTS, dtype=torch.float32), zeros(b, PARTS, dtype=torch.int32), zeros(b, dtype=torch.int32)
    return Rows(zeros(b), zeros(b, 1), zeros(b, 1), zeros(b, 1), zeros(b, 1), eos_ids, *scratch)


def choose_greedily(logits: Tensor, rows: Rows, peers: Peers | None = None, first: int = 0) -> None:
    """Choose each row's likeliest token by logits (b, vocabulary), the first of equals, and move the row on. With
    `peers`, which takes the kernel, the logits are those of this rank's share of the vocabulary, from `first` on."""
    if logits.is_cuda and machine(logits.device) is not None:
        return _launch(logits, rows, peers, first)
    assert peers is None
    top, token = logits.max(-1)
    move_on(token, top.isfinite(), rows)


def move_on(token: Tensor, fit: Tensor, rows: Rows) -> None:
    """Take `token` (b) as chosen, of logits that were `fit` for use (b; bool)."""
    rows.tokens.copy_(torch.where(fit, token, -1))
    rows.fed.copy_(token[:, None])
    rows.lengths.add_(rows.going)
    stop(rows)


def stop(rows: Rows) -> None:
    """End the rows whose last token, not fed yet, is their end."""
    last = (rows.fed == rows.eos).any(-1, keepdim=True) | (rows.lengths + 1 >= rows.ends)
    rows.going.masked_fill_(last, 0)


def _launch(logits: Tensor, rows: Rows, peers: Peers | None = None, first: int = 0) -> None:
    from fms.kernels.gpu.next_token import next_token

    known = machine(logits.device)
    assert known is not None
    b, n = logits.shape
    logits = logits.contiguous()
    parts = min(PARTS, power(-(-n // 256)))

    def sizes() -> tuple[tuple[int, ...], dict[str, int]]:
        named = {"N": n, "PARTS": parts, "BLOCK": min(1024, power(-(-n // parts))), "EOS": len(rows.eos)}
        named |= {"EARLY": known.early, "FIRST": first, "ROWS": ROWS, "FLAG": BLOCKS, "FLAGS": FLAGS}
        return (b, parts), named | meeting(peers) | {"num_warps": 4}

    shared = (rows.eos, rows.eos) if peers is None else (peers.bases, peers.times)
    key = b, n, len(rows.eos), first, *((0, 1) if peers is None else (peers.rank, peers.size))
    start(next_token, (logits, *rows, *shared), (), sizes, key)
