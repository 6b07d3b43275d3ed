"""{rotary + cache write + attention}: from projected heads to their weighted values."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
Angles = tuple[Tensor, Tensor]  # cos, sin: (b or 1, s, 1, head_dim); the first half of sin is negated
Norms = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # of query heads and of key heads


class LayerCache(Protocol):
    """One layer's keys and values: takes the new ones, (b, kvheads, s, head_dim), and returns all to attend to."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate heads `x` (b, s, heads, head_dim): channel i with i + head_dim / 2, computed in fp32."""
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).type_as(x)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Angles | None,
    mask: Tensor | None,
    layer: LayerCache | None,
    scale: float | None = None,
    *,
    causal: bool = True,
    norms: Norms | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of q (b, s, heads, d) over k and v (b, s, kvheads, d) and what `layer` holds: (b, s, heads * d).

    `mask` broadcasts to (b, heads, s, kv): bool, where True takes part, or a float that is added. `None` is causal, or
    everything if not `causal`. `norms` act on each head of q and of k before they are rotated.
    """
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    return _weigh(q, k, v, mask, layer, scale, causal, dropout)


def attend_packed(
    qkv: Tensor,
    kvheads: int,
    head_dim: int,
    angles: Angles | None,
    mask: Tensor | None,
    layer: LayerCache | None,
    scale: float | None = None,
    *,
    causal: bool = True,
    norms: Norms | None = None,
) -> Tensor:
    """`attend` on what a fused projection gives, (b, s, (heads + 2 kvheads) * d): query, key and value heads."""
    qk, v = qkv.unflatten(-1, (-1, head_dim)).tensor_split((-kvheads,), dim=2)
    if norms is not None:
        q, k = qk.tensor_split((-kvheads,), dim=2)
        return attend(q, k, v, angles, mask, layer, scale, causal=causal, norms=norms)
    if angles is not None:
        qk = rotate(qk, angles)
    q, k = qk.tensor_split((-kvheads,), dim=2)
    return _weigh(q, k, v, mask, layer, scale, causal, 0.0)


def _weigh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: LayerCache | None,
    scale: float | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    b, s, heads, d = q.shape
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # b h s d
    if layer is not None:
        k, v = layer.update(k, v)
    if s == 1 and (mask is None or mask.shape[-3:-1] == (1, 1)):
        # one token: the heads of a group read the same keys, so they are rows of one product and nothing is repeated
        q = q.reshape(b, k.shape[1], -1, d)
        if mask is None and q.is_cuda and q.dtype in HALF and d % 8 == 0:
            # by name: with PyTorch's own choice, on Hopper, each length seen for the first time cost some 40 ms
            out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, scale=scale)[0]
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return out.reshape(b, 1, heads * d)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal and mask is None, scale=scale, enable_gqa=k.shape[1] != heads
    )
    return out.transpose(1, 2).flatten(2)
