"""Few rows times a weight, as in `linear.py`, summed over ranks by the programs that multiply."""

# ruff: noqa: N803, N806 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.linear import rows_times, tiles_of
from fms.kernels.gpu.parts import early, fetch, vector
from fms.kernels.gpu.ranks import added, collected, of_rank, stamped, word


@triton.jit(do_not_specialize=["rows"])
def stream_sum(
    x, w, bias, residual, y, bases, times, rows, scale,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, KQ: tl.constexpr, BN: tl.constexpr, GRID: tl.constexpr,
    STAGES: tl.constexpr, PAIRS: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr, TIMES: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, WAIT: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`residual + scale * (the ranks' sum of x @ w.T + bias)` of one or two rows, added in the order of ranks:
    `stream`, whose programs write what they compute to the same programs of the other ranks, as `sum_add` does, and at
    their end add what those have written.

    A program's places in the memory are its own, two that it takes in turn: who has the others' parts of one sum knows
    that they have read those of the one before.
    """
    TWO: tl.constexpr = KQ > 1
    HALF: tl.constexpr = BN // 2
    KIND: tl.constexpr = y.dtype.element_ty
    PAIR: tl.constexpr = tl.pointer_type(tl.int32)
    program, last = tl.program_id(0), rows - 1
    k1, k2, first = tl.arange(0, KP), KP + tl.arange(0, KQ), program * BN
    a1, a2 = tl.zeros((KP,), tl.float32), tl.zeros((KQ,), tl.float32)
    b1, b2 = a1, a2
    time = tl.full((), 0, tl.int64)
    for at in tl.range(first, N, GRID * BN, num_stages=STAGES):
        n = at + tl.arange(0, BN)
        w1 = fetch(w, n, k1, N, K)
        w2 = w1
        if TWO:
            w2 = fetch(w, n, k2, N, K)
        if at == first:
            early(EARLY)
            a1, a2 = vector(x, k1, k1 < K), vector(x, k2, k2 < K)
            b1, b2 = vector(x + last * K, k1, k1 < K), vector(x + last * K, k2, k2 < K)
            time = tl.load(times + TIMES + program) + 1
        ra, rb = rows_times(w1, w2, a1, a2, b1, b2, 1.0, 1.0, TWO)
        low_a, high_a = tl.split(tl.reshape(ra, (HALF, 2)))
        low_b, high_b = tl.split(tl.reshape(rb, (HALF, 2)))
        part_a, part_b = stamped(word(low_a, high_a, KIND), time), stamped(word(low_b, high_b, KIND), time)
        place = ((time % 2).to(tl.int32) * RANKS + RANK) * PROGRAMS + program
        place = place * PAIRS + (at - first) // GRID + tl.arange(0, HALF)
        for r in tl.static_range(RANKS):
            theirs = of_rank(bases, r, PARTS, tl.int64) + place
            tl.store(theirs, part_a, cache_modifier=".wt")
            tl.store(theirs + HALF, part_b, cache_modifier=".wt")
    at = tl.arange(0, PAIRS)  # for each pass of the loop so many of the first row, then of the second
    row, n = at % BN // HALF, first + at // BN * (GRID * BN) + at % HALF * 2
    inside = n < N
    pairs = (row * last * N + n) // 2
    before, more = tl.load(residual.to(PAIR) + pairs, mask=inside, other=0), tl.zeros((PAIRS,), tl.int32)
    if BIAS:
        more = tl.load(bias.to(PAIR) + n // 2, mask=inside, other=0)
    theirs = of_rank(bases, RANK, PARTS, tl.int64) + ((time % 2).to(tl.int32) * RANKS * PROGRAMS + program) * PAIRS + at
    low, high = collected(before, theirs, PROGRAMS * PAIRS, inside, time, KIND, RANK, RANKS, WAIT, True)
    done = added(low, high, more, before, scale, KIND, BIAS, True)
    tl.store(y.to(PAIR) + pairs, done, mask=inside & (row <= last))
    tl.store(times + TIMES + program, time)


@triton.jit(do_not_specialize=["rows"])
def tile_sum(
    x, w, bias, residual, y, bases, times, rows, scale,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PAIRS: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr, TIMES: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, WAIT: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`stream_sum` of more rows: `tile`. Where there is no room for all programs at once, those of the lowest numbers
    run first, on every rank: no two wait for each other."""
    HALF: tl.constexpr = BN // 2
    KIND: tl.constexpr = y.dtype.element_ty
    PAIR: tl.constexpr = tl.pointer_type(tl.int32)
    program, m = tl.program_id(0), tl.arange(0, M)
    r, _ = tiles_of(x, w, m, program * BN + tl.arange(0, BN), rows, N, K, BK, STAGES, False, EARLY)
    n = program * BN + tl.arange(0, HALF) * 2
    inside = (m[:, None] < rows) & (n[None, :] < N)
    pairs = (m[:, None] * N + n[None, :]) // 2
    before, more = tl.load(residual.to(PAIR) + pairs, mask=inside, other=0), tl.zeros((HALF,), tl.int32)
    if BIAS:
        more = tl.load(bias.to(PAIR) + n // 2, mask=n < N, other=0)
    time = tl.load(times + TIMES + program) + 1
    low, high = tl.split(tl.reshape(r, (M, HALF, 2)))
    mine = word(low, high, KIND)
    part = stamped(mine, time)
    place = ((time % 2).to(tl.int32) * RANKS * PROGRAMS + program) * PAIRS + m[:, None] * HALF + tl.arange(0, HALF)
    for other in tl.static_range(RANKS):
        if other != RANK:
            theirs = of_rank(bases, other, PARTS, tl.int64) + RANK * PROGRAMS * PAIRS + place
            tl.store(theirs, part, mask=inside, cache_modifier=".wt")
    theirs = of_rank(bases, RANK, PARTS, tl.int64) + place
    low, high = collected(mine, theirs, PROGRAMS * PAIRS, inside, time, KIND, RANK, RANKS, WAIT, False)
    done = added(low, high, more[None, :], before, scale, KIND, BIAS, True)
    tl.store(y.to(PAIR) + pairs, done, mask=inside)
    tl.store(times + TIMES + program, time)
