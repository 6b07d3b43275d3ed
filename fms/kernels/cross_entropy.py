"""{softmax and its difference from the label}: what a cross-entropy needs of logits, which are never copied in fp32."""

from typing import Any

import torch
from torch import Tensor

from fms.kernels.launching import machine

BLOCK = 4096  # logits that a program reads at once


def served(logits: Tensor) -> bool:
    """Whether the kernels take such logits; on a CPU, and in fp64, plain operations do the same."""
    return machine(logits.device) is not None and logits.dtype != torch.float64 and logits.is_contiguous()


def tally(logits: Tensor, labels: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of `factor` times the logits (n, vocabulary): the largest, the sum of exp(logit - largest), and the
    label's, 0 where that is -1; (n,) each, in fp32 at least."""
    if served(logits) and logits.shape[1]:
        from fms.kernels.gpu import cross_entropy as kernels

        n, size = logits.shape
        top, total, right = (logits.new_empty(n, dtype=torch.float32) for _ in range(3))
        kernels.tally[(n,)](logits, labels, top, total, right, factor, size, BLOCK=BLOCK, num_warps=8)
        return top, total, right
    wide = _wide(logits, factor)
    if not logits.shape[1]:  # a share of the vocabulary without a token
        zeros = wide.new_zeros(len(wide))
        return torch.full_like(zeros, -torch.inf), zeros, zeros
    top = wide.amax(1)
    right = wide.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0)
    return top, (wide - top[:, None]).exp_().sum(1), right


def slope_(logits: Tensor, labels: Tensor, log_sum: Tensor, factor: float = 1.0) -> Tensor:
    """The gradient of the cross-entropies to the logits (n, vocabulary), in their place: `factor` times (softmax less
    one at the label, if that is not -1). `log_sum` (n,) is that of `factor` times the logits; infinite: no gradient."""
    if served(logits) and logits.shape[1]:
        from fms.kernels.gpu import cross_entropy as kernels

        n, size = logits.shape
        grid: Any = (n, -(-size // BLOCK))
        kernels.slope[grid](logits, labels, log_sum, factor, size, BLOCK=BLOCK, num_warps=8)
        return logits
    wide = _wide(logits, factor)
    wide = wide.sub_(log_sum[:, None]) if wide is logits else wide.sub(log_sum[:, None])
    wide = wide.exp_()
    if logits.shape[1]:
        wide.scatter_add_(1, labels.clamp(min=0)[:, None], -(labels >= 0)[:, None].to(wide))
    if factor != 1:
        wide.mul_(factor)
    return wide if wide is logits else logits.copy_(wide)


def _wide(logits: Tensor, factor: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if factor == 1 else wide * factor
