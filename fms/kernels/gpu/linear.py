"""Few rows times a weight, at the speed of reading it: norm, bias, activation, gate and residual on the way.

`y = residual + scale * (act(norm(x) @ w.T + bias))`, gated: `act(gate) * up` with the rows of gate above those of up.
Three forms. `stream`: one or two rows, kept in registers while the weight's rows flow past. `walk`: the same block by
block, for rows too wide for that. `tile`: up to 32 rows, on tensor cores, normalised beforehand: in every program anew,
that took as long as the product.

A single row is computed as two are, twice. Reading takes as long, and a program that took fewer registers would leave
room for others where there is none to be: of programs that stay to the end, as many as fit are to be on each
multiprocessor, or some get more of them than others, and all wait for these.

Each kernel may be launched before the one it depends on has ended (programmatic dependent launch). It fetches its first
weights meanwhile; all that an earlier kernel wrote is read, and everything is written, behind `gdc_wait`. In `stream`
the wait is part of the loop's first round, so that the loop's stages are filled before it. The compiler fills stages
with every load that stands in the loop itself: what an earlier kernel wrote is loaded in a branch of it.
"""

# ruff: noqa: N803, N806 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import activate, early, fetch, vector


@triton.jit
def finish(
    y, bias, before, n, row, r, u, scale,
    N: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Store one row's outputs n: r is what the linear layer (or its gate) gave, u what the up half gave, `before` the
    residual."""
    if BIAS:
        r += vector(bias, n, n < N)
        if GLU:
            u += vector(bias + N, n, n < N)
    r = activate(r, ACT)
    if GLU:
        r *= u
    if ADD:
        r = before + scale * r
    tl.store(y + row * N + n, r.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def normalised(x1, x2, g1, g2, b1, b2, k1, k2, eps, K: tl.constexpr, LAYER: tl.constexpr, TWO: tl.constexpr):
    """Two parts of (x times g), and what the products are to be multiplied by; with LayerNorm of norm(x), and 1."""
    if LAYER:
        mean = tl.sum(x1, 0) / K
        if TWO:
            mean += tl.sum(x2, 0) / K
            x2 = tl.where(k2 < K, x2 - mean, 0.0)
        x1 = tl.where(k1 < K, x1 - mean, 0.0)
    square = tl.sum(x1 * x1, 0)
    if TWO:
        square += tl.sum(x2 * x2, 0)
        x2 *= g2
    factor, x1 = tl.rsqrt(square / K + eps), x1 * g1
    if LAYER:
        x1, x2, factor = x1 * factor + b1, x2 * factor + b2, 1.0
    return x1, x2, factor


@triton.jit
def rows_times(w1, w2, a1, a2, b1, b2, fa, fb, TWO: tl.constexpr):
    """Fetched rows of a weight, in two parts, times the rows a and b."""
    w1 = w1.to(tl.float32)
    ra, rb = tl.sum(w1 * a1[None, :], 1), tl.sum(w1 * b1[None, :], 1)
    if TWO:
        w2 = w2.to(tl.float32)
        ra += tl.sum(w2 * a2[None, :], 1)
        rb += tl.sum(w2 * b2[None, :], 1)
    return ra * fa, rb * fb


@triton.jit(do_not_specialize=["rows"])
def stream(
    x, g, b, w, bias, residual, y, rows, eps, scale,
    N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, KQ: tl.constexpr, BN: tl.constexpr,
    GRID: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    TWO: tl.constexpr = KQ > 1
    last = rows - 1
    k1, k2, first = tl.arange(0, KP), KP + tl.arange(0, KQ), tl.program_id(0) * BN
    a1, a2 = tl.zeros((KP,), tl.float32), tl.zeros((KQ,), tl.float32)
    b1, b2 = a1, a2
    fa = tl.full((), 1.0, tl.float32)
    fb = fa
    for at in tl.range(first, N, GRID * BN, num_stages=STAGES):
        n = at + tl.arange(0, BN)
        w1 = fetch(w, n, k1, N, K)
        w2, u1, u2 = w1, w1, w1
        if TWO:
            w2 = fetch(w, n, k2, N, K)
        if GLU:
            u1 = fetch(w + N * K, n, k1, N, K)
            if TWO:
                u2 = fetch(w + N * K, n, k2, N, K)
        if at == first:
            early(EARLY)
            a1, a2 = vector(x, k1, k1 < K), vector(x, k2, k2 < K)
            b1, b2 = vector(x + last * K, k1, k1 < K), vector(x + last * K, k2, k2 < K)
            if NORM > 0:
                g1, g2 = vector(g, k1, k1 < K), vector(g, k2, k2 < K)
                c1, c2 = g1, g2
                if NORM == 2:
                    c1, c2 = vector(b, k1, k1 < K), vector(b, k2, k2 < K)
                a1, a2, fa = normalised(a1, a2, g1, g2, c1, c2, k1, k2, eps, K, NORM == 2, TWO)
                b1, b2, fb = normalised(b1, b2, g1, g2, c1, c2, k1, k2, eps, K, NORM == 2, TWO)
        before_a, before_b = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
        if ADD and at < N:  # which it always is: for a branch, see above
            before_a, before_b = vector(residual, n, n < N), vector(residual + last * N, n, n < N)
        ra, rb = rows_times(w1, w2, a1, a2, b1, b2, fa, fb, TWO)
        ua, ub = ra, rb
        if GLU:
            ua, ub = rows_times(u1, u2, a1, a2, b1, b2, fa, fb, TWO)
        finish(y, bias, before_a, n, 0, ra, ua, scale, N, ACT, GLU, BIAS, ADD)
        finish(y, bias, before_b, n, last, rb, ub, scale, N, ACT, GLU, BIAS, ADD)


@triton.jit
def step_of(x, g, k, last, ra, rb, ua, ub, sa, sb, K, NORM, GLU, fetched, fetched_up):
    """A block of columns k: its products added to the rows' sums, elementwise, and the squares of x to theirs."""
    inside = k < K
    wf = fetched.to(tl.float32)
    uf = wf
    if GLU:
        uf = fetched_up.to(tl.float32)
    xa, xb = vector(x, k, inside), vector(x + last * K, k, inside)
    if NORM == 1:
        weight = vector(g, k, inside)
        sa += xa * xa
        sb += xb * xb
        xa *= weight
        xb *= weight
    ra += wf * xa[None, :]
    rb += wf * xb[None, :]
    if GLU:
        ua += uf * xa[None, :]
        ub += uf * xb[None, :]
    return ra, rb, ua, ub, sa, sb


@triton.jit(do_not_specialize=["rows"])
def walk(
    x, g, b, w, bias, residual, y, rows, eps, scale,
    N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    k, n, last = tl.arange(0, BK), tl.program_id(0) * BN + tl.arange(0, BN), rows - 1
    w0 = fetch(w, n, k, N, K)
    u0 = w0
    if GLU:
        u0 = fetch(w + N * K, n, k, N, K)
    early(EARLY)
    ra, rb = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    ua, ub = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    sa, sb = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    if STAGES == 0:  # unrolled, a block ahead
        for at in tl.static_range(0, K, BK):
            w1, u1 = w0, u0
            if at + BK < K:
                w0 = fetch(w, n, at + BK + k, N, K)
                if GLU:
                    u0 = fetch(w + N * K, n, at + BK + k, N, K)
            ra, rb, ua, ub, sa, sb = step_of(x, g, at + k, last, ra, rb, ua, ub, sa, sb, K, NORM, GLU, w1, u1)
    else:
        ra, rb, ua, ub, sa, sb = step_of(x, g, k, last, ra, rb, ua, ub, sa, sb, K, NORM, GLU, w0, u0)
        for at in tl.range(BK, K, BK, num_stages=STAGES):
            w1 = fetch(w, n, at + k, N, K)
            u1 = w1
            if GLU:
                u1 = fetch(w + N * K, n, at + k, N, K)
            ra, rb, ua, ub, sa, sb = step_of(x, g, at + k, last, ra, rb, ua, ub, sa, sb, K, NORM, GLU, w1, u1)
    fa, fb = 1.0, 1.0
    if NORM == 1:
        fa, fb = tl.rsqrt(tl.sum(sa, 0) / K + eps), tl.rsqrt(tl.sum(sb, 0) / K + eps)
    before_a, before_b = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    if ADD:
        before_a, before_b = vector(residual, n, n < N), vector(residual + last * N, n, n < N)
    finish(y, bias, before_a, n, 0, tl.sum(ra, 1) * fa, tl.sum(ua, 1) * fa, scale, N, ACT, GLU, BIAS, ADD)
    finish(y, bias, before_b, n, last, tl.sum(rb, 1) * fb, tl.sum(ub, 1) * fb, scale, N, ACT, GLU, BIAS, ADD)


@triton.jit
def rows_of(x, m, k, rows, K: tl.constexpr):
    return tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < K), other=0.0)


@triton.jit
def tiles_of(
    x, w, m, n, rows,
    N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GLU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Rows m times the weight's rows n, and with GLU times those of its other half."""
    k = tl.arange(0, BK)
    w0 = fetch(w, n, k, N, K)
    u0 = w0
    if GLU:
        u0 = fetch(w + N * K, n, k, N, K)
    early(EARLY)
    x0 = rows_of(x, m, k, rows, K)
    r = tl.dot(x0, w0.T)
    u = r
    if GLU:
        u = tl.dot(x0, u0.T)
    for at in tl.range(BK, K, BK, num_stages=STAGES):
        x1 = rows_of(x, m, at + k, rows, K)
        r = tl.dot(x1, fetch(w, n, at + k, N, K).T, r)
        if GLU:
            u = tl.dot(x1, fetch(w + N * K, n, at + k, N, K).T, u)
    return r, u


@triton.jit(do_not_specialize=["rows"])
def tile(
    x, w, bias, residual, y, rows, scale,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, M)
    r, u = tiles_of(x, w, m, n, rows, N, K, BK, STAGES, GLU, EARLY)
    if BIAS:
        r += vector(bias, n, n < N)[None, :]
        if GLU:
            u += vector(bias + N, n, n < N)[None, :]
    r = activate(r, ACT)
    if GLU:
        r *= u
    place, inside = m[:, None] * N + n[None, :], (m[:, None] < rows) & (n[None, :] < N)
    if ADD:
        r = vector(residual, place, inside) + scale * r
    tl.store(y + place, r.to(y.dtype.element_ty), mask=inside)
