"""{gradient's factor + AdamW + copy in another type}: all that a step does to a parameter, each byte moved once."""

import torch
from torch import Tensor

from fms.kernels.skinny import Sizes, machine, start

BLOCK = 2048  # elements a program


def serves_adamw(device: torch.device) -> bool:
    return machine(device) is not None


def adamw_(
    p: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    copy: Tensor,
    told: Tensor,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on p, its means and a copy, all of one shape;
    p and means in fp32.

    `told` (4, fp32): the gradient's factor, 1 - beta1^t, the root of 1 - beta2^t, and 0 where nothing is to be done.
    """
    from fms.kernels.gpu.adamw import adamw as kernel

    n = p.numel()
    tensors = p, gradient.contiguous(), mean, square, copy, told

    def sizes() -> Sizes:
        return (-(-n // BLOCK),), {"BLOCK": BLOCK, "num_warps": 8}

    start(kernel, (*tensors, n, lr, decay, *betas, eps), sizes, n)
