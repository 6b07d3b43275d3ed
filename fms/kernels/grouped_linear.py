"""{grouped linear}: each row times the matrix of its own group, as the experts of a mixture have it."""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 256  # rows up to which a GPU computes all groups' products faster than it waits for the groups' sizes


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows `x` (s, in), sorted by group, the last of group g before row `ends[g]`, through weight (groups, out, in).

    Gives (s, out). On a GPU in bf16 it is one product, and for few rows of other types the rows' part of all groups'
    products: neither waits for anything. Else it is a loop over the groups that have rows, one operation if compiled.
    """
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and x.shape[1] % 8 == weight.shape[1] % 8 == 0:
        return F.grouped_mm(x, weight.mT, offs=ends)
    if x.is_cuda and len(x) <= FEW:
        row = torch.arange(len(x), device=x.device, dtype=ends.dtype)
        every = F.linear(x, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])  # s groups out
        return every[row, torch.searchsorted(ends, row, right=True)]
    return _opaque(x, weight, ends) if torch.compiler.is_compiling() else _loop(x, weight, ends)


def _loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.cat(
        [F.linear(rows, matrix) for rows, matrix in zip(_split(x, ends), weight, strict=True) if len(rows)]
    )


def _split(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    sizes = ends.diff(prepend=ends.new_zeros(1))
    return x.split(sizes.tolist())


@torch.library.custom_op("fms::grouped_linear", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _loop(x, weight, ends)


@torch.library.custom_op("fms::grouped_outer", mutates_args=())
def _outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The sum over each group's rows of y (s, out) times x (s, in): (groups, out, in)."""
    return torch.stack([a.mT @ b for a, b in zip(_split(y, ends), _split(x, ends), strict=True)])


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _save(ctx, inputs, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    return _opaque(gradient, weight.mT, ends), _outer(gradient, x, ends), None


_opaque.register_autograd(_backward, setup_context=_save)
