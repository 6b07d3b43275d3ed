"""What ranks do together within a kernel, through memory of each that all of them address."""

# ruff: noqa: N803, N806 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import early, vector


@triton.jit
def of_rank(bases, r, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """The address of a part of rank r's memory, whose beginnings are in `bases`."""
    return tl.multiple_of((tl.load(bases + r) + OFFSET).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def meet(bases, flag, time, FLAGS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WAIT: tl.constexpr):
    """Let the other ranks see all that this program has written, and see all that their same programs have; `time`
    counts the meetings of this `flag`. Whether all have come before WAIT looks."""
    tl.debug_barrier()
    for r in tl.static_range(RANKS):
        if r != RANK:
            theirs = of_rank(bases, r, FLAGS, tl.int64) + flag * RANKS + RANK
            tl.atomic_xchg(theirs, time, sem="release", scope="sys")
    mine = of_rank(bases, RANK, FLAGS, tl.int64) + flag * RANKS
    late, looks = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for r in tl.static_range(RANKS):
        if r != RANK:
            seen = tl.atomic_add(mine + r, 0, sem="acquire", scope="sys")
            while (seen < time) & (looks < WAIT):
                seen = tl.atomic_add(mine + r, 0, sem="acquire", scope="sys")
                looks += 1
            if seen < time:
                late += 1
    tl.debug_barrier()
    return late == 0


@triton.jit
def pair(words, KIND: tl.constexpr):
    """The two halves of 32-bit words, as numbers."""
    low, high = (words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16)
    return low.to(KIND, bitcast=True).to(tl.float32), high.to(KIND, bitcast=True).to(tl.float32)


@triton.jit
def word(low, high, KIND: tl.constexpr):
    low, high = low.to(KIND).to(tl.int16, bitcast=True), high.to(KIND).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def stamped(words, time):
    """Two elements each, and beside them the count, in eight bytes, which arrive together."""
    return (words.to(tl.int64) & 0xFFFFFFFF) | (time << 32)


@triton.jit
def any_other(words, stamp):
    """Whether any of the words has not the count of `stamp`."""
    other = ((words ^ stamp) >> 32 != 0).to(tl.int32)
    return tl.max(tl.reshape(other, (other.numel,), can_reorder=True), 0)


@triton.jit
def collected(
    mine, theirs, step, inside, time,
    KIND: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WAIT: tl.constexpr, SENT: tl.constexpr,
):  # fmt: skip
    """The sum, in the order of ranks, of what each has written for this `time` at `theirs`, rank after rank by `step`,
    all of it in this rank's memory; of words that are `mine` for this rank itself, if it has not SENT them there too.
    NaN where one has not come after WAIT looks."""
    low, high = tl.zeros(mine.shape, tl.float32), tl.zeros(mine.shape, tl.float32)
    stamp, looks = time << 32, tl.full((), 0, tl.int32)
    for r in tl.static_range(RANKS):
        if r == RANK and not SENT:
            a, b = pair(mine, KIND)
        else:
            got = tl.load(theirs + r * step, mask=inside, other=stamp, volatile=True)
            missing = any_other(got, stamp)
            while (missing != 0) & (looks < WAIT):
                got = tl.load(theirs + r * step, mask=inside, other=stamp, volatile=True)
                missing = any_other(got, stamp)
                looks += 1
            a, b = pair(got.to(tl.int32), KIND)
            a, b = tl.where(missing == 0, a, float("nan")), tl.where(missing == 0, b, float("nan"))
        low += a
        high += b
    return low, high


@triton.jit
def added(low, high, bias, residual, scale, KIND: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr):
    """`residual + scale * (sum + bias)`, in words."""
    if BIAS:
        a, b = pair(bias, KIND)
        low += a
        high += b
    if ADD:
        a, b = pair(residual, KIND)
        low, high = a + scale * low, b + scale * high
    return word(low, high, KIND)


@triton.jit(do_not_specialize=["eighths"])
def sum_add(
    y, residual, bias, out, bases, times, eighths, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, WAIT: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`residual + scale * (the ranks' sum of y + bias)`, 8 times `eighths` elements, added in the order of ranks.

    Each rank writes its part where the others will read it, for a write need not be waited for as a read must. Beside
    every two elements stands the count of the sums that this block has had, in the same eight bytes, which arrive
    together: who finds the count has the elements, and nobody has to say that they are there (as NCCL's LL does). Sums
    take turns in three slots: who has the others' parts of one knows that they have read the slots of those before.
    """
    block = tl.program_id(0)
    at = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)  # of pairs
    inside = at < eighths * 4  # said so that a thread's elements are fetched at once
    KIND: tl.constexpr = y.dtype.element_ty
    PAIR: tl.constexpr = tl.pointer_type(tl.int32)
    here = of_rank(bases, RANK, PARTS, tl.int64)
    NEXT: tl.constexpr = (RANK + 1) % RANKS
    there = of_rank(bases, NEXT, PARTS, tl.int64)
    early(EARLY)
    time = tl.load(times + block) + 1
    slot = (time % 3).to(tl.int32) * RANKS
    mine = tl.load(y.to(PAIR) + at, mask=inside, other=0)
    before, more = tl.zeros((BLOCK // 2,), tl.int32), tl.zeros((BLOCK // 2,), tl.int32)
    if ADD:  # here, as nothing is fetched while the others are waited for
        before = tl.load(residual.to(PAIR) + at, mask=inside, other=0)
    if BIAS:
        more = tl.load(bias.to(PAIR) + at % (WIDTH // 2), mask=inside, other=0)
    part = stamped(mine, time)
    for r in tl.static_range(RANKS):
        if r != RANK:
            theirs = there if r == NEXT else of_rank(bases, r, PARTS, tl.int64)
            tl.store(theirs + (slot + RANK) * (SLOT // 2) + at, part, mask=inside, cache_modifier=".wt")
    low, high = collected(mine, here + slot * (SLOT // 2) + at, SLOT // 2, inside, time, KIND, RANK, RANKS, WAIT, False)
    tl.store(out.to(PAIR) + at, added(low, high, more, before, scale, KIND, BIAS, ADD), mask=inside)
    tl.store(times + block, time)


@triton.jit(do_not_specialize=["eighths"])
def sum_add_shared(
    y, residual, bias, out, bases, times, eighths, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
    FLAGS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WAIT: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`sum_add` of more: of every RANKS blocks each rank adds one, and writes the sum to the others.

    A program's place in the memory of the others is its own within a kernel, and two meetings a round say that it was
    read; the next kernel begins when all programs of this one have ended.
    """
    KIND: tl.constexpr = y.dtype.element_ty
    SHARE: tl.constexpr = ROUND // RANKS
    program, step = tl.program_id(0), tl.num_programs(0) * BLOCK
    early(EARLY)
    n = eighths * 8
    time = tl.load(times + program)
    for begin in range(0, n, ROUND):
        end = tl.multiple_of(tl.minimum(n - begin, ROUND), 8)
        for i in range(program * BLOCK, tl.cdiv(end, RANKS), step):
            place = tl.multiple_of(i, BLOCK) + tl.arange(0, BLOCK)
            for r in tl.static_range(RANKS):
                if r != RANK:
                    at = place + i * (RANKS - 1) + r * BLOCK
                    part = tl.load(y + begin + at, mask=at < end, other=0.0)
                    tl.store(of_rank(bases, r, PARTS, KIND) + RANK * SHARE + place, part, mask=at < end)
        came = meet(bases, program, time + 1, FLAGS, RANK, RANKS, WAIT)
        for i in range(program * BLOCK, tl.cdiv(end, RANKS), step):
            place = tl.multiple_of(i, BLOCK) + tl.arange(0, BLOCK)
            at = place + i * (RANKS - 1) + RANK * BLOCK
            inside = at < end
            total = tl.zeros((BLOCK,), tl.float32)
            for r in tl.static_range(RANKS):
                if r == RANK:
                    total += vector(y + begin, at, inside)
                else:
                    theirs = of_rank(bases, RANK, PARTS, KIND) + r * SHARE + place
                    total += tl.load(theirs, mask=inside, other=0.0, volatile=True).to(tl.float32)
            if BIAS:
                total += vector(bias, (begin + at) % WIDTH, inside)
            if ADD:
                total = vector(residual + begin, at, inside) + scale * total
            done = tl.where(came, total, float("nan")).to(KIND)
            tl.store(out + begin + at, done, mask=inside)
            for r in tl.static_range(RANKS):
                if r != RANK:
                    tl.store(of_rank(bases, r, SUMS, KIND) + at, done, mask=inside)
        came = meet(bases, program, time + 2, FLAGS, RANK, RANKS, WAIT)
        for i in range(program * BLOCK, tl.cdiv(end, RANKS), step):
            place = tl.multiple_of(i, BLOCK) + tl.arange(0, BLOCK)
            for r in tl.static_range(RANKS):
                if r != RANK:
                    at = place + i * (RANKS - 1) + r * BLOCK
                    done = tl.load(of_rank(bases, RANK, SUMS, KIND) + at, mask=at < end, other=0.0, volatile=True)
                    tl.store(out + begin + at, tl.where(came, done, float("nan")), mask=at < end)
        time += 2
    tl.store(times + program, time)


@triton.jit(do_not_specialize=["eighths"])
def sum_add_once(
    y, residual, bias, out, bases, times, eighths, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    FLAGS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, WAIT: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`sum_add_shared` for two ranks: each adds all, after one meeting a round for which as many bytes go.

    A program's places in the other's memory are its own, two that it takes in turn: who has met the other again knows
    that it has read what was there before.
    """
    KIND: tl.constexpr = y.dtype.element_ty
    PLACE: tl.constexpr = ROUND // BLOCKS
    OTHER: tl.constexpr = 1 - RANK
    program, programs = tl.program_id(0), tl.num_programs(0)
    early(EARLY)
    n = eighths * 8
    time = tl.load(times + program)
    for begin in range(0, n, ROUND):
        each = tl.cdiv(tl.minimum(n - begin, ROUND), programs * 8) * 8
        first = tl.multiple_of(begin + program * each, 8)
        end = tl.multiple_of(tl.minimum(first + each, tl.minimum(n, begin + ROUND)), 8)
        place = ((time % 2).to(tl.int32) * BLOCKS + program) * PLACE
        for i in range(0, each, BLOCK):
            k = tl.multiple_of(i, BLOCK) + tl.arange(0, BLOCK)
            part = tl.load(y + first + k, mask=first + k < end, other=0.0)
            tl.store(of_rank(bases, OTHER, PARTS, KIND) + place + k, part, mask=first + k < end)
        came = meet(bases, program, time + 1, FLAGS, RANK, RANKS, WAIT)
        for i in range(0, each, BLOCK):
            k = tl.multiple_of(i, BLOCK) + tl.arange(0, BLOCK)
            inside = first + k < end
            theirs = of_rank(bases, RANK, PARTS, KIND) + place + k
            total = vector(y + first, k, inside) + tl.load(theirs, mask=inside, other=0.0, volatile=True).to(tl.float32)
            if BIAS:
                total += vector(bias, (first + k) % WIDTH, inside)
            if ADD:
                total = vector(residual + first, k, inside) + scale * total
            tl.store(out + first + k, tl.where(came, total, float("nan")).to(KIND), mask=inside)
        time += 1
    tl.store(times + program, time)


@triton.jit
def sum_parts(own, others, out, n, scale, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of several ranks, this one's and (RANKS - 1, n) of the others, added in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(RANKS):
        if r == RANK:
            total += vector(own, at, inside)
        else:
            total += vector(others, at + (r - (r > RANK)) * tl.cast(n, tl.int64), inside)
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def choice_of_ranks(
    bases, times, row, top, token,
    B: tl.constexpr, FLAGS: tl.constexpr, FLAG: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """The highest logit of all ranks' and its token, the first of equals; NaN where a rank has not come."""
    bits = top.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as the numbers are
    best = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    time = tl.load(times + FLAG + row)
    place = (time % 3) * B + row
    tl.store(of_rank(bases, RANK, 0, tl.int64) + place, best)
    came = meet(bases, FLAG + row, time + 1, FLAGS, RANK, RANKS, WAIT)
    for r in tl.static_range(RANKS):
        best = tl.maximum(best, tl.load(of_rank(bases, r, 0, tl.int64) + place, volatile=True))
    tl.store(times + FLAG + row, time + 1)
    ordered = (best >> 32).to(tl.int32)
    top = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    return tl.where(came, top, float("nan")), 0x7FFFFFFF - (best & 0x7FFFFFFF)
