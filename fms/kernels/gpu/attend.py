"""Attention of one new token a row over a cache: rotary, cache write and split-KV attention in one kernel.

A program takes one key head, up to 16 of the query heads that share it, and a part of the row's keys. (More heads, or
heads as columns, make products of a warp group: ptxas 12.8 gave one of these an address that was not its own.) The
last to arrive joins all parts; it alone sees the counter full, and empties it. No program reads the slot that is being
written: the new key and value come from registers. How many keys a row has is read on the device, so that a graph can
be replayed.

The first blocks of keys are fetched before the kernel ahead has ended: the wait for it is in the first round of the
loop over blocks, whose stages the compiler fills before. What wrote these keys ended long ago: every step begins with
kernels that are not launched early, and these wait for all before them.
"""

# ruff: noqa: N803, N806 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import early, vector


@triton.jit
def block(k, v, t, limit, hole, e, d, HALF: tl.constexpr, D: tl.constexpr):
    """Key halves and values (slots, channels) at slots t, and which of them hold a token that is seen."""
    seen = (t < limit) & (t != hole)
    at, inside = t[:, None] * D, seen[:, None] & (e[None, :] < HALF)
    k1 = tl.load(k + at + e[None, :], mask=inside, other=0.0)
    k2 = tl.load(k + at + HALF + e[None, :], mask=inside, other=0.0)
    return k1, k2, tl.load(v + at + d[None, :], mask=seen[:, None] & (d[None, :] < D), other=0.0), seen


@triton.jit
def fold_one(q1, q2, k1, k2, vs, seen, best, total, acc):
    """Fold a block into the running (largest score, sum of weights, weighted values) of one head; scores are powers
    of two."""
    s = tl.sum(k1.to(tl.float32) * q1[None, :] + k2.to(tl.float32) * q2[None, :], 1)
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(best, tl.max(s, 0))
    p, keep = tl.exp2(s - new), tl.exp2(best - new)
    return new, total * keep + tl.sum(p, 0), acc * keep + tl.sum(p[:, None] * vs.to(tl.float32), 0)


@triton.jit
def weights_of(q1, q2, k1, k2, seen, best):
    """Of the heads of a group, q (heads, channels): the largest scores so far, and the weights of a block's slots."""
    s = tl.dot(q2, k2.T, tl.dot(q1, k1.T))
    s = tl.where(seen[None, :], s, float("-inf"))
    new = tl.maximum(best, tl.max(s, 1))
    return new, tl.exp2(s - new[:, None])


@triton.jit
def factor_of(x1, x2, eps, HALF: tl.constexpr, AXIS: tl.constexpr):
    """What RMSNorm multiplies heads in two halves by."""
    return tl.rsqrt((tl.sum(x1 * x1, AXIS) + tl.sum(x2 * x2, AXIS)) / (2 * HALF) + eps)


@triton.jit
def join(parts, out, used, G: tl.constexpr, GB: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """The values of a group's heads out of what the parts of their keys left."""
    i, d = tl.arange(0, SPLITS), tl.arange(0, DP)
    one = parts + i * G * (D + 2)
    for first in range(0, G, GB):
        h = first + tl.arange(0, GB)
        there = (i[:, None] < used) & (h[None, :] < G)
        tops = tl.load(one[:, None] + G * D + h[None, :], mask=there, other=-1e30, volatile=True)
        totals = tl.load(one[:, None] + G * D + G + h[None, :], mask=there, other=0.0, volatile=True)
        place = h[None, :, None] * D + d[None, None, :]
        values = tl.load(
            one[:, None, None] + place, mask=there[:, :, None] & (d[None, None, :] < D), other=0.0, volatile=True
        )
        share = tl.exp2(tops - tl.max(tops, 0)[None, :])
        whole = tl.where(h < G, tl.sum(share * totals, 0), 1.0)
        value = tl.sum(share[:, :, None] * values, 0) / whole[:, None]
        inside = (h[:, None] < G) & (d[None, :] < D)
        tl.store(out + h[:, None] * D + d[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["angle_stride", "position_stride", "slots", "capacity"])
def attend(
    qkv, k, v, cos, sin, positions, q_norm, k_norm, parts, counts, out, angle_stride, position_stride, slots, capacity,
    scale, eps,
    KV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, GB: tl.constexpr,
    ROPE: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (G + GP - 1) // GP
    pair, tile, split = tl.program_id(0) // TILES, tl.program_id(0) % TILES, tl.program_id(1)
    row, head = pair // KV, pair % KV
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = (G + 2) * KV * D
    LEFT: tl.constexpr = G * (D + 2)  # of a part
    e, d = tl.arange(0, HP), tl.arange(0, DP)
    place = tl.load(positions + row * position_stride).to(tl.int32)
    hole = place % capacity
    limit = tl.minimum(place, capacity)
    used = tl.maximum(tl.minimum(SPLITS, tl.cdiv(limit, PART)), 1)
    if split < used:
        size = tl.cdiv(limit, used)
        start, end = split * size, tl.minimum(split * size + size, limit)
        k += pair.to(tl.int64) * slots * D
        v += pair.to(tl.int64) * slots * D
        base, g = qkv + row * WIDTH, tile * GP + tl.arange(0, GP)
        c, s = tl.full((HP,), 1.0, tl.float32), tl.zeros((HP,), tl.float32)
        if G == 1:
            q1, q2 = tl.zeros((HP,), tl.float32), tl.zeros((HP,), tl.float32)
            best, total, acc = tl.full((), -1e30, tl.float32), tl.zeros((), tl.float32), tl.zeros((DP,), tl.float32)
        else:
            q1, q2 = tl.zeros((GP, HP), k.dtype.element_ty), tl.zeros((GP, HP), k.dtype.element_ty)
            best, total = tl.full((GP,), -1e30, tl.float32), tl.zeros((GP,), tl.float32)
            acc = tl.zeros((GP, DP), tl.float32)
        for t in tl.range(start, tl.maximum(end, start + 1), BLOCK, num_stages=STAGES):
            k1, k2, vs, seen = block(k, v, t + tl.arange(0, BLOCK), end, hole, e, d, HALF, D)
            if t == start:
                early(EARLY)
                if ROPE:
                    c = vector(cos + row * angle_stride, e, e < HALF)
                    s = vector(sin + row * angle_stride + HALF, e, e < HALF)
                if G == 1:
                    n1, n2 = vector(base + head * D, e, e < HALF), vector(base + head * D + HALF, e, e < HALF)
                    if NORM:
                        factor = factor_of(n1, n2, eps, HALF, 0)
                        n1 = n1 * factor * vector(q_norm, e, e < HALF)
                        n2 = n2 * factor * vector(q_norm + HALF, e, e < HALF)
                    q1 = (n1 * c - n2 * s).to(k1.dtype).to(tl.float32) * scale * 1.4426950408889634
                    q2 = (n2 * c + n1 * s).to(k1.dtype).to(tl.float32) * scale * 1.4426950408889634
                else:
                    at, inside = (head * G + g)[:, None] * D + e[None, :], (g[:, None] < G) & (e[None, :] < HALF)
                    n1, n2 = vector(base, at, inside), vector(base + HALF, at, inside)
                    if NORM:
                        factor = factor_of(n1, n2, eps, HALF, 1)[:, None]
                        n1 = n1 * factor * vector(q_norm, e, e < HALF)[None, :]
                        n2 = n2 * factor * vector(q_norm + HALF, e, e < HALF)[None, :]
                    # scaled before they are rounded: products of halves leave no other place
                    factors = scale * 1.4426950408889634
                    q1 = ((n1 * c[None, :] - n2 * s[None, :]) * factors).to(k1.dtype)
                    q2 = ((n2 * c[None, :] + n1 * s[None, :]) * factors).to(k1.dtype)
            if G == 1:
                best, total, acc = fold_one(q1, q2, k1, k2, vs, seen, best, total, acc)
            else:
                new, p = weights_of(q1, q2, k1, k2, seen, best)
                keep = tl.exp2(best - new)
                best, total = new, total * keep + tl.sum(p, 1)
                acc = tl.dot(p.to(vs.dtype), vs, acc * keep[:, None])
        if split == 0:
            new = base + (G * KV + head) * D
            r1, r2 = vector(new, e, e < HALF), vector(new + HALF, e, e < HALF)
            if NORM:
                level = factor_of(r1, r2, eps, HALF, 0)
                r1, r2 = r1 * level * vector(k_norm, e, e < HALF), r2 * level * vector(k_norm + HALF, e, e < HALF)
            m1, m2 = (r1 * c - r2 * s).to(k.dtype.element_ty), (r2 * c + r1 * s).to(k.dtype.element_ty)
            nv = tl.load(new + KV * D + d, mask=d < D, other=0.0)
            tl.store(k + hole * D + e, m1, mask=(e < HALF) & (tile == 0))
            tl.store(k + hole * D + HALF + e, m2, mask=(e < HALF) & (tile == 0))
            tl.store(v + hole * D + d, nv, mask=(d < D) & (tile == 0))
            f1, f2 = m1.to(tl.float32), m2.to(tl.float32)
            if G == 1:
                score = tl.sum(q1 * f1 + q2 * f2, 0)
                top = tl.maximum(best, score)
                keep, weight = tl.exp2(best - top), tl.exp2(score - top)
                acc = acc * keep + weight * nv.to(tl.float32)
            else:
                score = tl.sum(q1.to(tl.float32) * f1[None, :] + q2.to(tl.float32) * f2[None, :], 1)
                top = tl.maximum(best, score)
                keep, weight = tl.exp2(best - top), tl.exp2(score - top)
                acc = acc * keep[:, None] + weight[:, None] * nv.to(tl.float32)[None, :]
            best, total = top, total * keep + weight
        mine = parts + (pair * SPLITS + split) * LEFT
        if G == 1:
            tl.store(mine + d, acc, mask=d < D)
            tl.store(mine + D, best)
            tl.store(mine + D + 1, total)
        else:
            tl.store(mine + g[:, None] * D + d[None, :], acc, mask=(g[:, None] < G) & (d[None, :] < D))
            tl.store(mine + G * D + g, best, mask=g < G)
            tl.store(mine + G * D + G + g, total, mask=g < G)
        tl.debug_barrier()
        if tl.atomic_add(counts + pair, 1, sem="acq_rel") == used * TILES - 1:
            join(parts + pair * SPLITS * LEFT, out + pair * G * D, used, G, GB, D, DP, SPLITS)
            tl.store(counts + pair, 0)
