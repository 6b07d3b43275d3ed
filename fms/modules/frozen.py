"""The inference forms of the blocks: fused weights, five operations."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fms.kernels.add_norm import add_norm, serves_add_norm
from fms.kernels.attend import Angles, LayerCache, attend_packed
from fms.kernels.linear_add import linear_add
from fms.kernels.norm_glu import norm_glu
from fms.kernels.norm_linear import norm_linear, normalise
from fms.modules.attention import Attention
from fms.modules.block import Block, EncoderBlock
from fms.modules.feedforward import FeedForward, GatedLinearUnit
from fms.modules.moe import MixtureOfExperts, SharedExpert
from fms.modules.tp import Communicator, Repeated, resharded


class Fused:
    """Linear layers of one input as one weight (sum of outs, in), and their biases as one. `ready` has what launches
    kernels on them, so that it need not be looked for again: with other weights comes another of these."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.ready: dict[Any, Any] = {}
        self._unbiased = None if bias is None else Fused(weight, None)

    @property
    def unbiased(self) -> "Fused":
        return self._unbiased or self

    def __reduce__(self) -> tuple[Any, ...]:
        return Fused, (self.weight, self.bias)


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
            if not isinstance(linear, Repeated):  # which keeps heads that this rank does not read
                view = resharded(linear._parameters[kind], view)
                linear.register_parameter(kind, nn.Parameter(view, requires_grad=False))
        fused.append(whole)
    return Fused(*fused)  # type: ignore[arg-type]


class Frozen(nn.Module):
    """A block's parts, under their names, and their weights as `forward` uses them: what `fuse` took of the parts."""

    comm: Communicator | None  # of the ranks that hold the other shards
    attn: Attention
    ff: GatedLinearUnit | FeedForward | MixtureOfExperts

    def __init__(self, block: Block | EncoderBlock):
        super().__init__()
        assert isinstance(block.ff, GatedLinearUnit | FeedForward | MixtureOfExperts)
        self.ln, self.attn, self.ff_ln, self.ff = block.ln, block.attn, block.ff_ln, block.ff
        self.requires_grad_(False)
        self.register_load_state_dict_post_hook(_fuse_again)
        self.fuse()

    def fuse(self) -> None:
        attn, ff = self.attn, self.ff
        self.qkv = fuse(attn.query, attn.key, attn.value)
        self.heads = len(attn.key.weight) // attn.head_dim, attn.head_dim
        self.comm = getattr(attn.dense, "comm", None)
        self.score_scale, self.norms = attn.scale, attn.norms
        self.dense = Fused(attn.dense.weight, attn.dense.bias)
        if isinstance(ff, MixtureOfExperts | SharedExpert):
            ff.fuse()
            return
        self.gated = isinstance(ff, GatedLinearUnit)
        self.up = fuse(ff.wg, ff.w1) if isinstance(ff, GatedLinearUnit) else Fused(ff.w1.weight, ff.w1.bias)
        self.activation = ff.activation
        self.down = Fused(ff.w2.weight, ff.w2.bias)

    def begin(self, x: Tensor, norm: nn.Module | None) -> tuple[Tensor, nn.Module | None]:
        """What the first projection of a sub-layer takes: its input, of all tokens, and the norm yet to be applied."""
        if norm is None or self.comm is None or self.comm.tokens is None:
            return x, norm
        return self.entered(normalise(x, norm)), None

    def entered(self, x: Tensor) -> Tensor:
        return x if self.comm is None else self.comm.enter(x)

    def end(self, x: Tensor, linear: Fused, residual: Tensor, scale: float = 1.0, own: bool = False) -> Tensor:
        """{linear + residual}, with the sum over ranks between where there are several. The residual may be overwritten
        if it is the block's `own`."""
        if self.comm is None:
            return linear_add(x, linear, residual, scale, own)
        if (y := self.comm.linear_add(x, linear, residual, scale)) is not None:
            return y
        return self.comm.leave_add(norm_linear(x, None, linear.unbiased), residual, scale, linear.bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # moves the views one by one: they leave the fused weight
        self.fuse()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # a copy's views are tensors of their own
        self.fuse()


class FrozenBlock(Frozen):
    """What `Block` computes, for inference only: {norm + q,k,v}, {rotary + cache + attention}, {dense + residual},
    {norm + up + activation}, {down + residual}; where the feed-forward is a mixture of experts, that and the norm and
    the residual around it."""

    def __init__(self, block: Block):
        super().__init__(block)
        self.scale = block.scale

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        mask: Tensor | None = None,
        layer: LayerCache | None = None,
        last_n_tokens: int = 0,
    ) -> Tensor:
        """Of x (b, s, emb_dim) all tokens, or at least the last ones: the keys and values of all go to `layer`."""
        qkv = norm_linear(*self.begin(x, self.ln), self.qkv)
        heads = attend_packed(qkv, *self.heads, angles, mask, layer, self.score_scale, norms=self.norms)
        if last_n_tokens and (self.comm is None or self.comm.tokens is None):
            heads, x = heads[:, -last_n_tokens:], x[:, -last_n_tokens:]
        x, h, norm = self.between(heads, x)
        if isinstance(self.ff, MixtureOfExperts | SharedExpert):
            return torch.add(x, self.ff(h if norm is None else normalise(h, norm)), alpha=self.scale)
        own = norm is None  # else a norm was given it, and who looks on there may keep it
        h = norm_glu(*self.begin(h, norm), self.up, self.activation, self.gated)
        return self.end(h, self.down, x, self.scale, own)

    def between(self, heads: Tensor, x: Tensor) -> tuple[Tensor, Tensor, nn.Module | None]:
        """{dense + residual}, and what the second sub-layer takes: its input, and the norm yet to be applied."""
        if self.comm is None and serves_add_norm(heads, self.ff_ln):
            return *add_norm(norm_linear(heads, None, self.dense), x, self.ff_ln, self.scale), None
        x = self.end(heads, self.dense, x, self.scale)
        return x, x, self.ff_ln


class FrozenEncoderBlock(Frozen):
    """What `EncoderBlock` computes: {q,k,v}, {attention}, {dense + residual}, norm, {up + activation},
    {down + residual}, norm."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = norm_linear(self.entered(x), None, self.qkv)
        heads = attend_packed(qkv, *self.heads, None, mask, None, self.score_scale, causal=False, norms=self.norms)
        x = self.ln(self.end(heads, self.dense, x))
        h = norm_glu(self.entered(x), None, self.up, self.activation, self.gated)
        return self.ff_ln(self.end(h, self.down, x))


def _fuse_again(block: Frozen, _: Any) -> None:
    """After a state dict: loaded with `assign=True` it replaced the views."""
    block.fuse()
