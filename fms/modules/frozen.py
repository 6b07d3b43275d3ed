"""The inference form of a block: fused weights, five operations."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fms.kernels.attend import Angles, LayerCache, attend_packed
from fms.kernels.linear_add import linear_add
from fms.kernels.norm_glu import norm_glu
from fms.kernels.norm_linear import norm_linear
from fms.modules.attention import Attention
from fms.modules.block import Block
from fms.modules.feedforward import GatedLinearUnit


class Fused(NamedTuple):
    """Linear layers of one input as one weight (sum of outs, in), and their biases as one."""

    weight: Tensor
    bias: Tensor | None


def fuse(*linears: nn.Linear) -> Fused:
    """One weight for several layers. Their own parameters become views of it: names stay, memory is not doubled."""
    fused: list[Tensor | None] = []
    for kind in ("weight", "bias"):
        parts = [getattr(linear, kind) for linear in linears]
        if parts[0] is None:
            fused.append(None)
            continue
        whole = torch.cat([p.detach() for p in parts])
        for linear, view in zip(linears, whole.split([len(p) for p in parts]), strict=True):
            setattr(linear, kind, nn.Parameter(view, requires_grad=False))
        fused.append(whole)
    return Fused(*fused)  # type: ignore[arg-type]


class FrozenBlock(nn.Module):
    """What `Block` computes, for inference only: {norm + q,k,v}, {rotary + cache + attention}, {dense + residual},
    {norm + gate,up + activation}, {down + residual}."""

    def __init__(self, block: Block):
        super().__init__()
        assert isinstance(block.ff, GatedLinearUnit)
        self.ln, self.ff_ln, self.scale = block.ln, block.ff_ln, block.scale
        self.attn: Attention = block.attn
        self.ff: GatedLinearUnit = block.ff
        self.requires_grad_(False)
        self.fuse()

    def fuse(self) -> None:
        self.qkv = fuse(self.attn.query, self.attn.key, self.attn.value)
        self.gate_up = fuse(self.ff.wg, self.ff.w1)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # moves the views one by one: they leave the fused weight
        self.fuse()
        return self

    def forward(
        self, x: Tensor, angles: Angles | None, mask: Tensor | None = None, layer: LayerCache | None = None
    ) -> Tensor:
        attn, ff = self.attn, self.ff
        qkv = norm_linear(x, self.ln, self.qkv)
        heads = attend_packed(qkv, attn.kvheads, attn.head_dim, angles, mask, layer, attn.scale)
        x = linear_add(heads, attn.dense, x, self.scale)
        h = norm_glu(x, self.ff_ln, self.gate_up, ff.activation)
        return linear_add(h, ff.w2, x, self.scale)
