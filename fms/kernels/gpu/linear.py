"""Few rows times a weight, at the speed of reading it: norm, bias, activation, gate and residual on the way.

`y = residual + scale * (act(norm(x) @ w.T + bias))`, gated: `act(gate) * up` with the rows of gate above those of up.
Three forms. `stream`: one or two rows, kept in registers while the weight's rows flow past. `walk`: the same block by
block, for rows too wide for that, or of a width far from a power of two. `tile`: up to 32 rows, on tensor cores,
normalised beforehand: in every program anew, that took as long as the product.

Each kernel may be launched before the one it depends on has ended (programmatic dependent launch). It fetches its first
weights meanwhile; all that an earlier kernel wrote is read, and everything is written, behind `gdc_wait`.
"""

# ruff: noqa: N803 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import activate, early, fetch, vector


@triton.jit
def finish(
    y, bias, residual, n, row, r, u, scale,
    N: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Store one row's outputs n: r is what the linear layer (or its gate) gave, u what the up half gave."""
    if BIAS:
        r += vector(bias, n, n < N)
        if GLU:
            u += vector(bias + N, n, n < N)
    r = activate(r, ACT)
    if GLU:
        r *= u
    if ADD:
        r = vector(residual + row * N, n, n < N) + scale * r
    tl.store(y + row * N + n, r.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def normalised(x, g, b, k, eps, K: tl.constexpr, LAYER: tl.constexpr):
    """(x times g, what the products are to be multiplied by), or with LayerNorm (norm(x), 1)."""
    if LAYER:
        x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
    factor = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    if LAYER:
        x = x * factor * g + b
        factor = 1.0
    else:
        x *= g
    return x, factor


@triton.jit
def stream(
    x, g, b, w, bias, residual, y, eps, scale,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, GRID: tl.constexpr,
    STAGES: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    k, n = tl.arange(0, KP), tl.program_id(0) * BN + tl.arange(0, BN)
    w0 = fetch(w, n, k, N, K)
    u0 = w0
    if GLU:
        u0 = fetch(w + N * K, n, k, N, K)
    g0 = tl.zeros((KP,), tl.float32)
    b0 = g0
    if NORM > 0:
        g0 = vector(g, k, k < K)
    if NORM == 2:
        b0 = vector(b, k, k < K)
    early(EARLY)
    xa = vector(x, k, k < K)
    xb = xa
    fa, fb = 1.0, 1.0
    if ROWS == 2:
        xb = vector(x + K, k, k < K)
    if NORM > 0:
        xa, fa = normalised(xa, g0, b0, k, eps, K, NORM == 2)
        if ROWS == 2:
            xb, fb = normalised(xb, g0, b0, k, eps, K, NORM == 2)
    wf = w0.to(tl.float32)
    uf = u0.to(tl.float32)
    ua = tl.zeros((BN,), tl.float32)
    if GLU:
        ua = tl.sum(uf * xa[None, :], 1) * fa
    finish(y, bias, residual, n, 0, tl.sum(wf * xa[None, :], 1) * fa, ua, scale, N, ACT, GLU, BIAS, ADD)
    if ROWS == 2:
        if GLU:
            ua = tl.sum(uf * xb[None, :], 1) * fb
        finish(y, bias, residual, n, 1, tl.sum(wf * xb[None, :], 1) * fb, ua, scale, N, ACT, GLU, BIAS, ADD)
    for at in tl.range(tl.program_id(0) * BN + GRID * BN, N, GRID * BN, num_stages=STAGES):
        m = at + tl.arange(0, BN)
        wl = fetch(w, m, k, N, K).to(tl.float32)
        ul = wl
        ub = tl.zeros((BN,), tl.float32)
        if GLU:
            ul = fetch(w + N * K, m, k, N, K).to(tl.float32)
            ub = tl.sum(ul * xa[None, :], 1) * fa
        finish(y, bias, residual, m, 0, tl.sum(wl * xa[None, :], 1) * fa, ub, scale, N, ACT, GLU, BIAS, ADD)
        if ROWS == 2:
            if GLU:
                ub = tl.sum(ul * xb[None, :], 1) * fb
            finish(y, bias, residual, m, 1, tl.sum(wl * xb[None, :], 1) * fb, ub, scale, N, ACT, GLU, BIAS, ADD)


@triton.jit
def walk(
    x, g, b, w, bias, residual, y, eps, scale,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr,
    ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    k, n = tl.arange(0, BK), tl.program_id(0) * BN + tl.arange(0, BN)
    w_next = fetch(w, n, k, N, K)
    u_next = w_next
    if GLU:
        u_next = fetch(w + N * K, n, k, N, K)
    early(EARLY)
    ra, rb = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    ua, ub = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    sa, sb = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    for at in tl.static_range(0, K, BK):
        wf = w_next.to(tl.float32)
        uf = wf
        if GLU:
            uf = u_next.to(tl.float32)
        if at + BK < K:
            w_next = fetch(w, n, at + BK + k, N, K)
            if GLU:
                u_next = fetch(w + N * K, n, at + BK + k, N, K)
        inside = at + k < K
        if NORM == 1:
            weight = vector(g, at + k, inside)
        xa = vector(x, at + k, inside)
        if NORM == 1:
            sa += xa * xa
            xa *= weight
        ra += wf * xa[None, :]
        if GLU:
            ua += uf * xa[None, :]
        if ROWS == 2:
            xb = vector(x + K, at + k, inside)
            if NORM == 1:
                sb += xb * xb
                xb *= weight
            rb += wf * xb[None, :]
            if GLU:
                ub += uf * xb[None, :]
    fa, fb = 1.0, 1.0
    if NORM == 1:
        fa, fb = tl.rsqrt(tl.sum(sa, 0) / K + eps), tl.rsqrt(tl.sum(sb, 0) / K + eps)
    finish(y, bias, residual, n, 0, tl.sum(ra, 1) * fa, tl.sum(ua, 1) * fa, scale, N, ACT, GLU, BIAS, ADD)
    if ROWS == 2:
        finish(y, bias, residual, n, 1, tl.sum(rb, 1) * fb, tl.sum(ub, 1) * fb, scale, N, ACT, GLU, BIAS, ADD)


@triton.jit
def rows_of(x, m, k, rows, K: tl.constexpr):
    return tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < K), other=0.0)


@triton.jit(do_not_specialize=["rows"])
def tile(
    x, w, bias, residual, y, rows, scale,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    ACT: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    k, n, m = tl.arange(0, BK), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, M)
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
