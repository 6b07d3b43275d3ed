"""Logits of a large vocabulary are read twice and written once, in the type that they have."""

# ruff: noqa: N803 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl


@triton.jit
def tally(logits, labels, top, total, right, factor, size, BLOCK: tl.constexpr):
    """A program a row: its largest logit, the sum of exp(logit - largest), its label's logit."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    label = tl.load(labels + row)
    most, found = -1e30, 0.0
    for at in range(0, size, BLOCK):
        o = at + tl.arange(0, BLOCK)
        x = tl.load(logits + o, mask=o < size, other=float("-inf")).to(tl.float32) * factor
        higher = tl.maximum(most, tl.max(x, 0))
        found = found * tl.exp(most - higher) + tl.sum(tl.exp(x - higher), 0)
        most = higher
    tl.store(top + row, most)
    tl.store(total + row, found)
    x = tl.load(logits + tl.maximum(label, 0)).to(tl.float32) * factor
    tl.store(right + row, tl.where(label < 0, 0.0, x))


@triton.jit
def slope(logits, labels, log_sum, factor, size, BLOCK: tl.constexpr):
    """A program a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * size
    x = tl.load(logits + o, mask=o < size, other=0.0).to(tl.float32) * factor
    x = tl.exp(x - tl.load(log_sum + row))
    x = tl.where(o == tl.load(labels + row), x - 1.0, x) * factor
    tl.store(logits + o, x.to(logits.dtype.element_ty), mask=o < size)
