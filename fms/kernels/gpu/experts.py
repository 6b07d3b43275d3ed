"""Few rows, each through the weights of the experts that a router chose for it: only those are read."""

# ruff: noqa: N803 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import activate, early, fetch, vector


@triton.jit
def up(
    x, w, chosen, y,
    TOP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`act(gate) * up` (rows TOP, N) of x (rows, K), by w (experts, 2 N, K). Programs of one part of N follow
    each other, so that rows of one expert find its weights in the cache."""
    pair, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    early(EARLY)
    w += tl.load(chosen + pair).to(tl.int64) * (2 * N * K)
    x += pair // TOP * K
    gates, ups = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    for at in tl.range(0, K, BK, num_stages=STAGES):
        k = at + tl.arange(0, BK)
        row = vector(x, k, k < K)[None, :]
        gates += fetch(w, n, k, N, K).to(tl.float32) * row
        ups += fetch(w + N * K, n, k, N, K).to(tl.float32) * row
    h = activate(tl.sum(gates, 1), ACT) * tl.sum(ups, 1)
    tl.store(y + pair.to(tl.int64) * N + n, h.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def down(
    h, w, chosen, weights, y,
    TOP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The sum with `weights` (rows, TOP) of what w (experts, N, K) makes of h (rows TOP, K): (rows, N)."""
    row, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    early(EARLY)
    total = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(TOP):
        pair = row * TOP + i
        matrix = w + tl.load(chosen + pair).to(tl.int64) * (N * K)
        sums = tl.zeros((BN, BK), tl.float32)
        for at in tl.range(0, K, BK, num_stages=STAGES):
            k = at + tl.arange(0, BK)
            sums += fetch(matrix, n, k, N, K).to(tl.float32) * vector(h + pair * K, k, k < K)[None, :]
        total += tl.load(weights + pair) * tl.sum(sums, 1)
    tl.store(y + row.to(tl.int64) * N + n, total.to(y.dtype.element_ty), mask=n < N)
