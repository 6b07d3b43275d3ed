"""{gradient's factor + AdamW + copy in another type}: all that a step does to a parameter, each byte moved once."""

import torch
from torch import Tensor

from fms.kernels.launching import HALF, Sizes, machine, start

BLOCK = 2048  # elements a program


def serves_adamw(p: Tensor) -> bool:
    return machine(p.device) is not None and p.dtype in (torch.float32, *HALF) and p.is_contiguous()


def adamw_(
    p: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    copy: Tensor | None,
    told: Tensor,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on p, its means and a copy, all of one shape,
    computed in fp32.

    `told` (4, fp32): the gradient's factor, 1 - beta1^t, the root of 1 - beta2^t, and 0 where nothing is to be done.
    """
    from fms.kernels.gpu.adamw import adamw as kernel

    n = p.numel()
    if not n:
        return
    tensors = p, gradient.contiguous(), mean, square, p if copy is None else copy, told
    numbers = map(float, (lr, decay, *betas, eps))  # a kernel compiled for a whole one takes no other

    def sizes() -> Sizes:
        return (-(-n // BLOCK),), {"COPY": copy is not None, "BLOCK": BLOCK, "num_warps": 8}

    start(kernel, tensors, (n, *numbers), sizes, (n, copy is None))
