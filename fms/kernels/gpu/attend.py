"""Attention of one new token a row over a cache: rotary, cache write and split-KV attention in one kernel.

A program takes one key head, the query heads that share it, and a part of the row's keys. The last part to arrive joins
them all; it alone sees the counter full, and empties it. No program reads the slot that is being written: the new key
and value come from registers. How many keys a row has is read on the device, so that a graph can be replayed.

The first block of keys is fetched before the kernel ahead has ended. What wrote it ended long ago: every step begins
with kernels that are not launched early, and these wait for all before them.
"""

# ruff: noqa: N803, N806 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import early, vector


@triton.jit
def block(k, v, t, limit, hole, e, d, HALF: tl.constexpr, D: tl.constexpr):
    """Key halves and values (slots, channels) at slots t, and which of them hold a token that is seen."""
    seen = (t < limit) & (t != hole)
    at, inside = t[:, None].to(tl.int64) * D, seen[:, None] & (e[None, :] < HALF)
    k1 = tl.load(k + at + e[None, :], mask=inside, other=0.0)
    k2 = tl.load(k + at + HALF + e[None, :], mask=inside, other=0.0)
    return k1, k2, tl.load(v + at + d[None, :], mask=seen[:, None] & (d[None, :] < D), other=0.0), seen


@triton.jit
def weigh(q1, q2, k1, k2, vs, seen, best, total, acc, scale, GP: tl.constexpr):
    """Fold a block into the running (largest score, sum of weights, weighted values), one or all heads of a group."""
    if GP == 1:
        one = tl.sum(k1.to(tl.float32) * q1.to(tl.float32) + k2.to(tl.float32) * q2.to(tl.float32), 1) * scale
        one = tl.where(seen, one, float("-inf"))
        new = tl.maximum(best, tl.max(one, 0))
        keep, p = tl.exp(best - new), tl.exp(one - tl.sum(new, 0))
        acc = acc * keep[:, None] + tl.sum(p[:, None] * vs.to(tl.float32), 0)[None, :]
        total = total * keep + tl.sum(p, 0)
    else:
        s = (tl.dot(q1, k1.T) + tl.dot(q2, k2.T)) * scale
        s = tl.where(seen[None, :], s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        weights, keep = tl.exp(s - new[:, None]), tl.exp(best - new)
        total = total * keep + tl.sum(weights, 1)
        acc = tl.dot(weights.to(vs.dtype), vs, acc * keep[:, None])
    return new, total, acc


@triton.jit
def normed(x1, x2, weight, e, eps, HALF: tl.constexpr):
    """RMSNorm of heads (heads, channels) in two halves."""
    factor = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
    first, second = vector(weight, e, e < HALF)[None, :], vector(weight + HALF, e, e < HALF)[None, :]
    return x1 * factor * first, x2 * factor * second


@triton.jit(do_not_specialize=["angle_stride", "position_stride"])
def attend(
    qkv, k, v, cos, sin, positions, q_norm, k_norm, parts, counts, out, angle_stride, position_stride, scale, eps,
    KV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    SLOTS: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr,
    ROPE: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = pair // KV, pair % KV
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = (G + 2) * KV * D
    e, d, g = tl.arange(0, HP), tl.arange(0, DP), tl.arange(0, GP)
    place = tl.load(positions + row * position_stride).to(tl.int32)
    hole = place % CAPACITY
    limit = tl.minimum(place, CAPACITY)
    used = tl.maximum(tl.minimum(SPLITS, tl.cdiv(limit, BLOCK)), 1)
    if split < used:
        size = tl.cdiv(limit, used)
        first, end = split * size, tl.minimum(split * size + size, limit)
        k += pair.to(tl.int64) * SLOTS * D
        v += pair.to(tl.int64) * SLOTS * D
        k1, k2, vs, seen = block(k, v, first + tl.arange(0, BLOCK), end, hole, e, d, HALF, D)
        early(EARLY)
        base = qkv + row * WIDTH
        at, inside = (head * G + g)[:, None] * D + e[None, :], (g[:, None] < G) & (e[None, :] < HALF)
        q1 = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
        q2 = tl.load(base + at + HALF, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            q1, q2 = normed(q1, q2, q_norm, e, eps, HALF)
        c, s = tl.full((HP,), 1.0, tl.float32), tl.zeros((HP,), tl.float32)
        if ROPE:
            c = vector(cos + row * angle_stride, e, e < HALF)
            s = vector(sin + row * angle_stride + HALF, e, e < HALF)
            q1, q2 = q1 * c[None, :] - q2 * s[None, :], q2 * c[None, :] + q1 * s[None, :]
        q1, q2 = q1.to(k1.dtype), q2.to(k1.dtype)
        best = tl.full((GP,), -1e30, tl.float32)
        total, acc = tl.zeros((GP,), tl.float32), tl.zeros((GP, DP), tl.float32)
        best, total, acc = weigh(q1, q2, k1, k2, vs, seen, best, total, acc, scale, GP)
        for t0 in tl.range(first + BLOCK, end, BLOCK):
            k1, k2, vs, seen = block(k, v, t0 + tl.arange(0, BLOCK), end, hole, e, d, HALF, D)
            best, total, acc = weigh(q1, q2, k1, k2, vs, seen, best, total, acc, scale, GP)
        if split == 0:
            new = base + (G * KV + head) * D
            n1, n2 = vector(new, e, e < HALF)[None, :], vector(new + HALF, e, e < HALF)[None, :]
            if NORM:
                n1, n2 = normed(n1, n2, k_norm, e, eps, HALF)
            n1, n2 = n1 * c[None, :] - n2 * s[None, :], n2 * c[None, :] + n1 * s[None, :]
            n1, n2 = n1.to(k1.dtype), n2.to(k1.dtype)
            nv = tl.load(new + KV * D + d, mask=d < D, other=0.0)
            slot = hole.to(tl.int64) * D
            tl.store(k + slot + e[None, :], n1, mask=e[None, :] < HALF)
            tl.store(k + slot + HALF + e[None, :], n2, mask=e[None, :] < HALF)
            tl.store(v + slot + d, nv, mask=d < D)
            score = tl.sum(q1.to(tl.float32) * n1.to(tl.float32) + q2.to(tl.float32) * n2.to(tl.float32), 1) * scale
            top = tl.maximum(best, score)
            keep, weight = tl.exp(best - top), tl.exp(score - top)
            acc = acc * keep[:, None] + weight[:, None] * nv.to(tl.float32)[None, :]
            best, total = top, total * keep + weight
        mine = parts + (pair * SPLITS + split) * G * (D + 2)
        tl.store(mine + g[:, None] * D + d[None, :], acc, mask=(g[:, None] < G) & (d[None, :] < D))
        tl.store(mine + G * D + g, best, mask=g < G)
        tl.store(mine + G * D + G + g, total, mask=g < G)
        tl.debug_barrier()
        if tl.atomic_add(counts + pair, 1, sem="acq_rel") == used - 1:
            start = parts + pair * SPLITS * G * (D + 2)
            for chunk in range(0, G * D, FLAT):
                f = chunk + tl.arange(0, FLAT)
                inner = f < G * D
                top = tl.full((FLAT,), -1e30, tl.float32)
                for i in tl.static_range(SPLITS):
                    one, there = start + i * G * (D + 2), inner & (i < used)
                    top = tl.maximum(top, tl.load(one + G * D + f // D, mask=there, other=-1e30, volatile=True))
                whole, values = tl.zeros((FLAT,), tl.float32), tl.zeros((FLAT,), tl.float32)
                for i in tl.static_range(SPLITS):
                    one, there = start + i * G * (D + 2), inner & (i < used)
                    share = tl.exp(tl.load(one + G * D + f // D, mask=there, other=-1e30, volatile=True) - top)
                    whole += share * tl.load(one + G * D + G + f // D, mask=there, other=0.0, volatile=True)
                    values += share * tl.load(one + f, mask=there, other=0.0, volatile=True)
                target = out + (row * KV + head) * G * D + f
                tl.store(target, (values / tl.where(inner, whole, 1.0)).to(out.dtype.element_ty), mask=inner)
            tl.store(counts + pair, 0)
