"""The likeliest token of each row, and what follows from it for the step after."""

# ruff: noqa: N803 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import early
from fms.kernels.gpu.ranks import choice_of_ranks


@triton.jit
def next_token(
    logits, tokens, fed, lengths, going, ends, eos, best, place, counts, bases, times,
    N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, EOS: tl.constexpr, EARLY: tl.constexpr,
    FIRST: tl.constexpr, ROWS: tl.constexpr, FLAGS: tl.constexpr, FLAG: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A program finds the best of a part of a row; the last of a row's to arrive joins them, and moves the row on. Of
    several ranks each has the vocabulary from its FIRST on."""
    row, part = tl.program_id(0), tl.program_id(1)
    size = tl.cdiv(N, PARTS)
    early(EARLY)
    top, where = tl.full((), float("-inf"), tl.float32), tl.full((), N, tl.int32)
    for at in tl.range(part * size, tl.minimum(part * size + size, N), BLOCK):
        n = at + tl.arange(0, BLOCK)
        inside = (n < N) & (n < part * size + size)
        x = tl.load(logits + row.to(tl.int64) * N + n, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))  # NaN wins, and is found
        here = tl.max(x, 0)
        if here > top:
            top, where = here, tl.min(tl.where((x == here) & inside, n, N), 0)
    tl.store(best + row * PARTS + part, top)
    tl.store(place + row * PARTS + part, where)
    tl.debug_barrier()
    if tl.atomic_add(counts + row, 1, sem="acq_rel") == PARTS - 1:
        p = tl.arange(0, PARTS)
        tops = tl.load(best + row * PARTS + p, volatile=True)
        wheres = tl.load(place + row * PARTS + p, volatile=True)
        winner = tl.max(tops, 0)
        token = FIRST + tl.minimum(tl.min(tl.where(tops == winner, wheres, N), 0), N - 1).to(tl.int64)
        if RANKS > 1:
            winner, token = choice_of_ranks(bases, times, row, winner, token, ROWS, FLAGS, FLAG, RANK, RANKS, WAIT)
        fit = (winner < float("inf")) & (winner > float("-inf"))
        goes = tl.load(going + row)
        length = tl.load(lengths + row) + goes
        over = length + 1 >= tl.load(ends + row)
        for i in tl.static_range(EOS):
            over = over | (tl.load(eos + i) == token)
        tl.store(tokens + row, tl.where(fit, token, -1))
        tl.store(fed + row, token)
        tl.store(lengths + row, length)
        tl.store(going + row, tl.where(over, 0, goes))
        tl.store(counts + row, 0)
