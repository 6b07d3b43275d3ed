"""AdamW in one pass over memory."""

# ruff: noqa: N803 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl

from fms.kernels.gpu.parts import vector


@triton.jit
def adamw(p, g, m, v, copy, told, n, lr, decay, beta1, beta2, eps, COPY: tl.constexpr, BLOCK: tl.constexpr):
    """A program a block; `told` is the gradient's factor, the two corrections for how young the means are, and 0 where
    nothing is to be done."""
    if tl.load(told + 3) != 0.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        gradient = vector(g, at, inside) * tl.load(told)
        mean, square = vector(m, at, inside), vector(v, at, inside)
        mean += (1.0 - beta1) * (gradient - mean)
        square = beta2 * square + (1.0 - beta2) * gradient * gradient
        below = tl.sqrt_rn(square) / tl.load(told + 2) + eps
        x = vector(p, at, inside)
        x -= lr * decay * x
        x -= lr / tl.load(told + 1) * (mean / below)
        tl.store(p + at, x.to(p.dtype.element_ty), mask=inside)
        tl.store(m + at, mean.to(m.dtype.element_ty), mask=inside)
        tl.store(v + at, square.to(v.dtype.element_ty), mask=inside)
        if COPY:
            tl.store(copy + at, x.to(copy.dtype.element_ty), mask=inside)
