"""What the kernels are made of."""

# ruff: noqa: N803 (what is known when a kernel is compiled is written in capitals)

import triton
import triton.language as tl


@triton.jit
def early(EARLY: tl.constexpr):
    """Let the next kernel start, then wait for what the one before wrote."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(w, n, k, N: tl.constexpr, K: tl.constexpr):
    """Rows n, columns k of a weight (N, K), which is read once and need not stay in any cache."""
    inside = (n[:, None] < N) & (k[None, :] < K)
    return tl.load(w + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def vector(p, at, inside):
    return tl.load(p + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """By number: the places in `fms.kernels.skinny.FUNCTIONS`."""
    if ACT == 1:
        x = x * tl.sigmoid(x)
    elif ACT == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 3:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == 4:
        x = tl.maximum(x, 0.0)
    return x
