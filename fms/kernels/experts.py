"""{experts}: few rows through the feed-forward layers that were chosen for each, added up."""

from collections.abc import Callable

import torch
from torch import Tensor

from fms.kernels.launching import HALF, Sizes, machine, power, start
from fms.kernels.ops import define
from fms.kernels.skinny import FUNCTIONS, activation_kind

PAIRS = 64  # the most rows times experts a row: each pair reads an expert's weights, a product of many rows once
PART = 4  # outputs a program


def experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Rows x (t, n) through up (experts, 2 hidden, n), gate's rows first, `activation(gate) * up`, and down (experts,
    n, hidden) of the experts `chosen` (t, k), summed with `weights` (t, k): (t, n). `None`: not served."""
    kind = activation_kind(activation)
    if kind is None or not (x.is_cuda and x.dtype in HALF and up.dtype == down.dtype == x.dtype):
        return None
    if not (up.is_contiguous() and down.is_contiguous()):
        return None
    if not 0 < chosen.numel() <= PAIRS or (torch.is_grad_enabled() and (x.requires_grad or up.requires_grad)):
        return None
    if torch.compiler.is_compiling():
        return few_through_experts(x, up, down, weights, chosen, kind)
    return None if machine(x.device) is None else launch(x, up, down, weights, chosen, kind)


def launch(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: int) -> Tensor:
    from fms.kernels.gpu import experts as kernels

    known = machine(x.device)
    assert known is not None
    rows, top = chosen.shape
    width, hidden = down.shape[1:]
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.float().contiguous()
    h, y = x.new_empty(rows * top, hidden), torch.empty_like(x)

    def sizes(programs: int, n: int, k: int) -> Sizes:
        named = {"TOP": top, "N": n, "K": k, "BN": PART, "BK": min(1024, power(k)), "STAGES": 3, "EARLY": known.early}
        return (programs, -(-n // PART)), named | {"num_warps": 4}

    def first() -> Sizes:
        grid, named = sizes(rows * top, hidden, width)
        return grid, named | {"ACT": activation}

    key = rows, top, width, hidden, activation
    start(kernels.up, (x, up, chosen, h), (), first, key)
    start(kernels.down, (h, down, chosen, weights, y), (), lambda: sizes(rows, width, hidden), key)
    return y


def reference(x: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: int) -> Tensor:
    """What `launch` computes, in plain operations."""
    gates, ups = (up[chosen] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)  # t k hidden
    h = FUNCTIONS[activation](gates) * ups
    return ((down[chosen] @ h[..., None]).squeeze(-1) * weights[..., None]).sum(1).type_as(x)


def _few_through_experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: int
) -> Tensor:
    run = reference if machine(x.device) is None else launch
    return run(x, up, down, weights, chosen, activation)


few_through_experts = define(
    "few_through_experts", _few_through_experts, lambda x, up, down, weights, chosen, activation: torch.empty_like(x)
)
