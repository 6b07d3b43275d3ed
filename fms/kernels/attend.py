"""{rotary + cache write + attention}: from projected heads to their weighted values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms.kernels.launching import HALF, machine, power, repeated, start
from fms.kernels.ops import define
from fms.kernels.skinny import epsilon, passes

PARTS = 64  # the most that a row's keys are split into
BLOCK = 64  # keys that are read at once, half of them where programs would have to wait for others to end
PART = 64  # keys from which on a row's are split
PLANNED = 2048  # tokens from which on cuDNN's attention is worth the tens of milliseconds it plans for each new length
OFTEN = 1000  # calls with fewer tokens, all of one shape, after which they have lost as much time as planning takes
Angles = tuple[Tensor, Tensor]  # cos, sin: (b or 1, s, 1, head_dim); the first half of sin is negated
Norms = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # of query heads and of key heads


Place = tuple[Tensor, Tensor, int]  # buffers of keys and of values (b, kvheads, slots, head_dim), and the first slot


class LayerCache(Protocol):
    """One layer's keys and values: takes the new ones, (b, kvheads, s, head_dim), and returns all to attend to.

    Where `place(x)` is a `Place` for tokens x (b, s, ...), a kernel puts them there, and `filled()` returns all.
    """

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class Scratch:
    """What the parts of a row's keys leave for the last of them to join; the layers of a cache share it."""

    def __init__(self, keys: Tensor, group: int):
        """Of keys (b, kvheads, slots, head_dim), each read by `group` query heads."""
        known = machine(keys.device)
        assert known is not None
        pairs = keys.shape[0] * keys.shape[1]
        wanted = min(32 * known.multiprocessors // pairs, -(-keys.shape[2] // PART), PARTS)
        self.splits = power(max(wanted, 1))
        self.ready: dict[Any, Any] = {}  # what launches a step of a kind that came before
        self.counts = torch.zeros(pairs, dtype=torch.int32, device=keys.device)
        self.parts = keys.new_empty(pairs * self.splits * group * (keys.shape[3] + 2), dtype=torch.float32)


@dataclass
class Step:
    """One new token a row, at `positions` (b or 1), of a cache whose layers have buffers k and v (b, kvheads, slots,
    head_dim): position p lies in slot p % `capacity`. `even`: all keys that a layer returns are behind every row."""

    positions: Tensor
    capacity: int
    scratch: Scratch
    even: bool

    def mask(self, keys: int) -> Tensor | None:
        """For those who attend to a layer's first slots by themselves."""
        slots = torch.arange(keys, device=self.positions.device)
        return None if self.even else slots <= self.positions[:, None, None, None]


def serves_step(keys: Tensor) -> bool:
    """Whether the kernel takes such buffers."""
    d = keys.shape[-1]
    return keys.is_cuda and keys.dtype in HALF and d % 2 == 0 and d <= 256 and machine(keys.device) is not None


def serves_flash(keys: Tensor) -> bool:
    """Whether PyTorch's flash kernel is to be asked by name, of keys (b, kvheads, slots, head_dim). It takes the last
    query for that of the last key, so that new tokens need no mask to see others before them."""
    d = keys.shape[-1]
    allowed = torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()
    there = keys.is_cuda and keys.dtype in HALF and machine(keys.device) is not None
    return there and allowed and d % 8 == 0 and d <= 256


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
    everything if not `causal`; a layer that is `later` has others before q, all of which see those. `norms` act on each
    head of q and of k before they are rotated.
    """
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    return _update(q, k, v, mask, layer, scale, causal, dropout)


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
    """`attend` on what a fused projection gives, (b, s, (heads + 2 kvheads) * d): query, key and value heads. It may
    use the room of `qkv` for its own."""
    step: Step | None = getattr(layer, "step", None)
    if step is not None and mask is None and qkv.dtype == layer.k.dtype and _simple(qkv, norms):  # type: ignore[union-attr]
        return _step(qkv, angles, layer, step, head_dim**-0.5 if scale is None else scale, norms)
    if passes(qkv) and _simple(qkv, norms) and qkv.is_contiguous() and head_dim % 2 == 0 and (angles or norms):
        buffers: Any = layer if hasattr(layer, "place") else None
        place = buffers and buffers.place(qkv)
        _rotate(qkv, kvheads, head_dim, angles, norms, place)
        if place:
            q = qkv[..., : -2 * kvheads * head_dim].unflatten(-1, (-1, head_dim)).transpose(1, 2)
            k, v = buffers.filled()
            return _weigh(q, k, v, mask, layer, scale, causal, 0.0)
        angles = norms = None
    qk, v = qkv.unflatten(-1, (-1, head_dim)).tensor_split((-kvheads,), dim=2)
    if norms is not None:
        q, k = qk.tensor_split((-kvheads,), dim=2)
        return attend(q, k, v, angles, mask, layer, scale, causal=causal, norms=norms)
    if angles is not None:
        qk = rotate(qk, angles)
    q, k = qk.tensor_split((-kvheads,), dim=2)
    return _update(q, k, v, mask, layer, scale, causal, 0.0)


def _update(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layer: LayerCache | None, *how: Any) -> Tensor:
    """`_weigh`, of new tokens q, k, v (b, s, heads, d)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if layer is not None:
        k, v = layer.update(k, v)
    return _weigh(q, k, v, mask, layer, *how)


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
    """Attention of q (b, heads, s, d) over all of k and v (b, kvheads, kv, d): (b, s, heads * d)."""
    b, heads, s, d = q.shape
    if mask is None and (step := getattr(layer, "step", None)) is not None:
        mask = step.mask(k.shape[2])
    if s == 1 and (mask is None or mask.shape[-3:-1] == (1, 1)):
        # one token: the heads of a group read the same keys, so they are rows of one product and nothing is repeated
        q = q.reshape(b, k.shape[1], -1, d)
        if mask is None and q.is_cuda and q.dtype in HALF and k.dtype == q.dtype and d % 8 == 0 and d <= 256:
            # by name: with PyTorch's own choice, on Hopper, each length seen for the first time cost some 40 ms
            out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, scale=scale)[0]
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return out.reshape(b, 1, heads * d)
    later = mask is None and getattr(layer, "later", False)
    learns = torch.is_grad_enabled() and q.requires_grad
    by_name = mask is None and not learns and k.dtype == q.dtype and serves_flash(k)
    square = s == k.shape[2]  # else the last query would be that of the last key, which may be an empty slot
    if by_name and (later or (square and s < PLANNED and not _comes_often(q, k))):
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal, scale=scale)[0]
        return out.transpose(1, 2).flatten(2)
    if later:
        mask = torch.ones(s, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - s)
    group = heads // k.shape[1]
    if group > 1 and mask is not None and q.is_cuda:  # no kernel of PyTorch's takes both: it would keep all scores
        k, v = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))
        group = 1
    out = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal and mask is None, scale=scale, enable_gqa=group > 1
    )
    return out.transpose(1, 2).flatten(2)


_calls: dict[tuple[Any, ...], int] = {}
_planned = ContextVar("planned", default=False)


@contextmanager
def planned() -> Iterator[None]:
    """Within, a plan is worth it for any shape."""
    before = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(before)


def _comes_often(q: Tensor, k: Tensor) -> bool:
    """Whether this shape has come so often that a plan for it is worth it."""
    if torch.compiler.is_compiling():
        return False
    if _planned.get():
        return True
    shape = q.device, q.dtype, q.shape, k.shape[1]
    if len(_calls) > OFTEN:
        _calls.clear()
    calls = _calls[shape] = _calls.get(shape, 0) + 1
    return calls > OFTEN


def _simple(qkv: Tensor, norms: Norms | None) -> bool:
    if torch.is_grad_enabled() and qkv.requires_grad:
        return False
    return norms is None or all(isinstance(norm, nn.RMSNorm) and norm.weight is not None for norm in norms)


def _rotate(
    qkv: Tensor, kvheads: int, head_dim: int, angles: Angles | None, norms: Any, place: Place | None = None
) -> None:
    """Normalise and rotate packed query and key heads where they lie; keys go to their `place`, if they have one, and
    values to theirs."""
    from fms.kernels.gpu import rows as kernels

    b, s, width = qkv.shape
    cos, sin = (qkv, qkv) if angles is None else (t.contiguous() for t in angles)
    q_norm, k_norm, eps = (qkv, qkv, 0.0) if norms is None else (norms[0].weight, norms[1].weight, epsilon(norms[0]))
    angle_rows = s if angles is not None and cos.shape[0] > 1 else 0
    keys, values, first = (qkv, qkv, 0) if place is None else place
    heads, store, block = width // head_dim - 2 * kvheads, place is not None, 16

    def sizes() -> tuple[tuple[int, ...], dict[str, Any]]:
        named = {"H": heads, "KV": kvheads, "D": head_dim, "HP": power(head_dim // 2), "BLOCK": block}
        named |= {"ROPE": angles is not None, "NORM": norms is not None, "STORE": store}
        return (b * s, -(-(heads + (2 if store else 1) * kvheads) // block)), named

    key = (b * s, heads, kvheads, head_dim, angles is None, norms is None, store)
    tensors = qkv, cos, sin, q_norm, k_norm, keys, values
    start(kernels.rotate, tensors, (s, angle_rows, first, keys.shape[2], float(eps)), sizes, key)


def _step(qkv: Tensor, angles: Angles | None, layer: Any, step: Step, scale: float, norms: Any) -> Tensor:
    k, v = layer.k, layer.v
    cos, sin = (None, None) if angles is None else angles
    q_norm, k_norm, eps = (None, None, 0.0) if norms is None else (norms[0].weight, norms[1].weight, epsilon(norms[0]))
    given = (qkv, k, v, step.positions, step.scratch.counts, step.scratch.parts, cos, sin, q_norm, k_norm)
    if torch.compiler.is_compiling():
        return attend_one(*given, scale, eps, step.capacity, step.scratch.splits)
    return _attend(given, scale, eps, step.capacity, step.scratch.splits, step.scratch.ready)


def attend_step(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    counts: Tensor,
    parts: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    scale: float,
    eps: float,
    capacity: int,
    splits: int,
) -> Tensor:
    """Write the new keys and values of packed heads (b, 1, ...) into k and v, attend to them and to what is there."""
    given = (qkv, k, v, positions, counts, parts, cos, sin, q_norm, k_norm)
    return _attend(given, scale, eps, capacity, splits, {})


def _attend(
    given: tuple[Any, ...], scale: float, eps: float, capacity: int, splits: int, ready: dict[Any, Any]
) -> Tensor:
    """`attend_step`; `ready` has what launches it again."""
    qkv, k, v, positions, counts, parts, cos, sin, q_norm, k_norm = given
    b, kvheads, slots, head_dim = k.shape
    qkv, width = qkv.contiguous(), qkv.shape[-1] - 2 * kvheads * head_dim
    out = qkv.new_empty(b, 1, width)
    turns, normed = cos is not None, q_norm is not None
    tensors = (
        qkv,
        k,
        v,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        positions,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        parts,
        counts,
        out,
    )
    wide = head_dim if cos is not None and cos.shape[0] > 1 else 0
    numbers = wide, 1 if positions.numel() > 1 else 0, slots, capacity, float(scale), float(eps)
    key = width, b, turns and cos.dtype, normed and q_norm.dtype
    run = ready.get(key)
    if run is None:
        group = width // head_dim // kvheads
        run = ready[key] = _prepare(qkv.device, b, kvheads, group, head_dim, splits, turns, normed)
    run(tensors, numbers)
    return out


def _prepare(
    device: torch.device, b: int, kvheads: int, group: int, head_dim: int, splits: int, turns: bool, normed: bool
) -> Any:
    """What launches a step of b rows, whose query and key heads are rotated (`turns`) and normalised."""
    from fms.kernels.gpu import attend as kernels

    known = machine(device)
    assert known is not None

    def sizes() -> tuple[tuple[int, ...], dict[str, Any]]:
        tile = 1 if group == 1 else 16  # query heads a program
        rows = b * kvheads * -(-group // tile)
        alone = rows * splits <= 8 * known.multiprocessors  # of 8, about 6 have keys, and 6 of one head fit
        return (rows, splits), {
            "KV": kvheads,
            "G": group,
            "GP": tile,
            "D": head_dim,
            "HP": max(16, power(head_dim // 2)),
            "DP": max(16, power(head_dim)),
            "SPLITS": splits,
            "PART": PART,
            "BLOCK": BLOCK if group > 1 or alone else BLOCK // 2,
            "STAGES": 2 if group == 1 or head_dim > 128 else 3,
            "GB": max(min(8192 // splits // power(head_dim), power(group)), 1),
            "ROPE": turns,
            "NORM": normed,
            "EARLY": known.early,
            "num_warps": 2 if head_dim <= 128 else 4,
        }

    return repeated(kernels.attend, sizes, (b, kvheads, group, head_dim, splits, turns, normed))


def _like_step(qkv, k, v, positions, counts, parts, cos, sin, q_norm, k_norm, scale, eps, capacity, splits):
    return qkv.new_empty(qkv.shape[0], 1, qkv.shape[-1] - 2 * k.shape[1] * k.shape[3])


attend_one = define("attend_one", attend_step, _like_step, ("k", "v", "counts", "parts"))
