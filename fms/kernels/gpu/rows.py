"""Passes over rows of activations: what is left between products, each row read once and written once."""

# ruff: noqa: N803, N806 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import activate, early, vector


@triton.jit
def norm(
    x, g, b, y, residual, total, eps, scale,
    K: tl.constexpr, KP: tl.constexpr, LAYER: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """RMSNorm or LayerNorm of rows of K, one a program, or of `total`, `residual + scale * x`; the norm's weights are
    fetched ahead."""
    k = tl.arange(0, KP)
    inside = k < K
    weight = vector(g, k, inside)
    bias = weight
    if LAYER:
        bias = vector(b, k, inside)
    early(EARLY)
    at = tl.program_id(0).to(tl.int64) * K + k
    h = vector(x, at, inside)
    if ADD:
        sum = (vector(residual, at, inside) + scale * h).to(x.dtype.element_ty)
        tl.store(total + at, sum, mask=inside)
        h = sum.to(tl.float32)
    if LAYER:
        h = tl.where(inside, h - tl.sum(h, 0) / K, 0.0)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / K + eps) * weight
    if LAYER:
        h += bias
    tl.store(y + at, h.to(y.dtype.element_ty), mask=inside)


@triton.jit
def glu(h, y, N: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr):
    """`act(gate) * up` of rows (gate, up) of 2 N."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up = vector(h + row * 2 * N, n, n < N), vector(h + row * 2 * N + N, n, n < N)
    tl.store(y + row * N + n, (activate(gate, ACT) * up).to(y.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["s", "angle_rows", "first", "slots"])
def rotate(
    qkv, cos, sin, q_norm, k_norm, keys, values, s, angle_rows, first, slots, eps,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate the query and key heads of packed tokens (heads, D), in place; or keys, and values as they
    are, into buffers (b, KV, slots, D) from slot `first` on."""
    HALF: tl.constexpr = D // 2
    token, head, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HP)
    head = head[:, None]
    at = qkv + token * (H + 2 * KV) * D + head * D + e[None, :]
    turned = head < H + KV
    inside = (head < H + (2 * KV if STORE else KV)) & (e[None, :] < HALF)
    v1, v2 = vector(at, 0, inside), vector(at + HALF, 0, inside)
    x1, x2 = v1, v2
    if NORM:
        factor = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        of_q = head < H
        x1 *= factor * tl.where(of_q, vector(q_norm, e, e < HALF)[None, :], vector(k_norm, e, e < HALF)[None, :])
        q2, k2 = vector(q_norm + HALF, e, e < HALF), vector(k_norm + HALF, e, e < HALF)
        x2 *= factor * tl.where(of_q, q2[None, :], k2[None, :])
    if ROPE:
        angle = ((token // s) * angle_rows + token % s) * D + e
        c, n = vector(cos, angle, e < HALF)[None, :], vector(sin + HALF, angle, e < HALF)[None, :]
        x1, x2 = x1 * c - x2 * n, x2 * c + x1 * n
    if STORE:
        kv = head - H
        x1, x2 = tl.where(turned, x1, v1), tl.where(turned, x2, v2)
        to = (((token // s) * KV + kv % KV) * slots + first + token % s) * D + e[None, :]
        tl.store(keys + to, x1.to(qkv.dtype.element_ty), mask=inside & (kv >= 0) & turned)
        tl.store(keys + to + HALF, x2.to(qkv.dtype.element_ty), mask=inside & (kv >= 0) & turned)
        tl.store(values + to, x1.to(qkv.dtype.element_ty), mask=inside & (kv >= KV))
        tl.store(values + to + HALF, x2.to(qkv.dtype.element_ty), mask=inside & (kv >= KV))
        inside &= kv < 0
    tl.store(at, x1.to(qkv.dtype.element_ty), mask=inside)
    tl.store(at + HALF, x2.to(qkv.dtype.element_ty), mask=inside)
