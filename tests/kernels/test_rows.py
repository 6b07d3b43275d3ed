"""Passes over many rows: rotary in place, gates; the kernels against plain operations in fp32."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms.kernels import attend as attention
from fms.kernels import norm_glu as glu
from fms.kernels import norm_linear, skinny
from fms.kernels.add_norm import add_norm
from fms.kernels.attend import _rotate, attend_packed, rotate
from fms.kernels.linear_add import linear_add
from fms.kernels.norm_linear import normalise
from fms.modules.cache import StaticCache
from fms.modules.frozen import Fused
from fms.modules.positions import Rope
from tests.kernels.poison import poison


def far(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def norms_of(d: int, **where: Any) -> Any:
    norms = nn.RMSNorm(d, eps=1e-6, **where), nn.RMSNorm(d, eps=1e-6, **where)
    for norm in norms:
        norm.weight.data.normal_(1, 0.3)
    return norms


def check_rotate(
    b: int, s: int, heads: int, kvheads: int, d: int, *, of_rows: bool, normed: bool, rope: bool = True, **where: Any
) -> None:
    qkv = torch.randn(b, s, (heads + 2 * kvheads) * d, **where)
    positions = torch.arange(s, device=qkv.device) + (torch.arange(b, device=qkv.device)[:, None] * 7 if of_rows else 0)
    angles = Rope(d, theta=50.0)(positions.view(-1, s), 100) if rope else None
    norms = norms_of(d, **where) if normed else None
    q, k, v = qkv.float().unflatten(-1, (-1, d)).split((heads, kvheads, kvheads), 2)
    if norms is not None:
        q, k = F.rms_norm(q, (d,), norms[0].weight.float(), 1e-6), F.rms_norm(k, (d,), norms[1].weight.float(), 1e-6)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    buffers = torch.randn(2, b, kvheads, s + 9, d, **where)
    packed, before = qkv.clone(), buffers.clone()
    with torch.no_grad():
        _rotate(packed, kvheads, d, angles, norms, (*buffers, 5))
        _rotate(qkv, kvheads, d, angles, norms)
    turned, keys, values = qkv.unflatten(-1, (-1, d)).split((heads, kvheads, kvheads), 2)
    assert torch.equal(packed[..., : heads * d], turned.flatten(2))
    for buffer, old, want in zip(buffers, before, (keys, values), strict=True):
        assert torch.equal(buffer[:, :, 5 : s + 5], want.transpose(1, 2))
        assert all(torch.equal(buffer[:, :, rest], old[:, :, rest]) for rest in (slice(5), slice(s + 5, None)))
    assert far(qkv, torch.cat((q, k, v), 2).flatten(2)) < 6e-3
    assert torch.equal(qkv[..., (heads + kvheads) * d :].float(), v.flatten(2))


@torch.no_grad()
def check_place(kvheads: int, d: int, **where: Any) -> None:
    """Tokens that go in at once, some behind others, and rows of unequal lengths: as by operations of PyTorch's."""
    device, norms = where.get("device", "cpu"), norms_of(d, **where)
    wide: Any = tuple(copy.deepcopy(norm).float() for norm in norms)
    ours = StaticCache(2, 16, 1, kvheads, d, where["dtype"], device)
    theirs = StaticCache(2, 16, 1, kvheads, d, torch.float32, device)
    layer, plain, copied = ours.layers[0], theirs.layers[0], []
    update = layer.update
    layer.update = lambda k, v: copied.append(k.shape[2]) or update(k, v)  # type: ignore[method-assign, func-returns-value]
    for n, take in ((5, None), (3, [[3], [1]]), (2, None)):
        qkv = torch.randn(2, n, (4 + 2 * kvheads) * d, **where)
        got = []
        for cache, of_heads in ((ours, norms), (theirs, wide)):
            if take is not None:
                cache.take = torch.tensor(take, device=device)
            positions, mask = cache.advance(n)
            angles = Rope(d, theta=50.0)(positions, 16)
            of_a_type = cache.layers[0].k.dtype
            got.append(
                attend_packed(qkv.to(of_a_type, copy=True), kvheads, d, angles, mask, cache.layers[0], norms=of_heads)
            )
        assert far(*got) < 1e-2
        assert far(layer.k, plain.k) < 6e-3
        assert far(layer.v, plain.v) < 1e-3
    assert copied == [2]


@torch.no_grad()
def check_other_rows(**where: Any) -> None:
    """More rows than the cache has are an error before anything is written."""
    cache = StaticCache(2, 16, 1, 2, 8, where["dtype"], where.get("device", "cpu"))
    positions, mask = cache.advance(3)
    angles, layer = Rope(8)(positions, 16), cache.layers[0]
    with pytest.raises(RuntimeError):
        attend_packed(torch.randn(3, 3, 64, **where), 2, 8, angles, mask, layer)
    assert not layer.k.any()
    assert layer.place(torch.randn(2, 3, 64, **where)) is not None
    assert layer.place(torch.randn(2, 3, 64, **where).float()) is None


def check_glu(rows: int, n: int, **where: Any) -> None:
    h = torch.randn(2, rows, 2 * n, **where)
    gate, up = h.float().chunk(2, -1)
    for kind, function in enumerate(skinny.FUNCTIONS):
        poison(2, rows, n, **where)
        assert far(glu._launch(h, kind), function(gate) * up) < 6e-3


@torch.no_grad()
def check_add_norm(rows: int, n: int, kind: type, **where: Any) -> None:
    norm, y, x = kind(n, eps=1e-5, **where), torch.randn(2, rows, n, **where), torch.randn(2, rows, n, **where)
    for p in norm.parameters():
        p.normal_(1, 0.3)
    for y1, x1 in ((y, x), (y.transpose(0, 1), x.transpose(0, 1))):
        poison(2, rows, n, **where)
        total, h = add_norm(y1, x1, norm, 0.7)
        assert far(total, x1.float() + 0.7 * y1.float()) < 6e-3
        want = copy.deepcopy(norm).float()(total.float())
        assert far(h, want) < 6e-3
        poison(2, rows, n, **where)
        assert far(normalise(total, norm), want) < 6e-3


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter itself
def test_interpreted(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "passes", lambda x: not (torch.is_grad_enabled() and x.requires_grad))
    for of_rows, normed, rope in ((False, False, True), (True, True, True), (False, True, False)):
        check_rotate(2, 3, 4, 2, 16, of_rows=of_rows, normed=normed, rope=rope, dtype=torch.float16)
    check_rotate(1, 2, 17, 1, 10, of_rows=False, normed=False, dtype=torch.float16)
    monkeypatch.setattr(attention, "passes", lambda x: x.dtype == torch.float16)
    for kvheads in (1, 2):
        check_place(kvheads, 8, dtype=torch.float16)
    check_other_rows(dtype=torch.float16)
    check_glu(3, 21, dtype=torch.float16)
    check_glu(1, 2100, dtype=torch.float16)
    check_add_norm(3, 100, nn.RMSNorm, dtype=torch.float16)
    check_add_norm(2, 64, nn.LayerNorm, dtype=torch.float16)


@pytest.mark.filterwarnings("ignore:Conversion of an array")
def test_a_gradient_of_the_norm_alone(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, y, x = norms_of(16, dtype=torch.float16)[0], torch.randn(2, 16).half(), torch.randn(2, 16).half()
    add_norm(y, x, norm)[1].sum().backward()
    assert norm.weight.grad.any()
    norm.weight.grad.zero_()
    monkeypatch.setattr(skinny, "passes", lambda x: True)
    normalise(x, norm).sum().backward()
    assert norm.weight.grad.any()


@pytest.mark.filterwarnings("ignore:Conversion of an array", "ignore:Mismatch dtype")
@pytest.mark.parametrize("passes", [True, False])
@torch.no_grad()
def test_norms_are_pytorchs(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch, passes: bool) -> None:
    """Of numbers so small that it shows which epsilon is added."""
    monkeypatch.setattr(skinny, "passes", lambda x: passes)
    x = (torch.randn(3, 4, 8) / 1000).half()
    kinds = nn.RMSNorm(8), nn.RMSNorm((4, 8)), nn.LayerNorm(8), nn.LayerNorm((4, 8)), nn.LayerNorm(8, bias=False)
    for norm in kinds:
        torch.testing.assert_close(normalise(x, norm.half()), norm(x), rtol=2e-3, atol=2e-3)
    of_another_type = nn.RMSNorm(8)
    torch.testing.assert_close(normalise(x, of_another_type), of_another_type(x), rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore:Conversion of an array")
def test_a_norm_that_is_kept(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launch is another with other parameters or another epsilon, and none where it learns; of many lengths some
    are kept."""
    monkeypatch.setattr(skinny, "passes", lambda x: x.dtype == torch.float16 and not x.requires_grad)
    monkeypatch.setattr(norm_linear, "KEPT", 5)
    norm, ready = nn.RMSNorm(8, eps=1e-6).half(), {}

    def check(x: Tensor) -> None:
        torch.testing.assert_close(normalise(x, norm, ready), norm(x), rtol=2e-3, atol=2e-3)

    with torch.no_grad():
        for _ in range(2):
            check(torch.randn(3, 8).half())
            assert len(ready) == 1
        norm.weight.mul_(2)
        check(torch.randn(3, 8).half())
        assert len(ready) == 1
        norm.weight = nn.Parameter(torch.randn(8).half())
        check(torch.randn(3, 8).half())
        norm.eps = 1.0
        check(torch.randn(3, 8).half())
        assert len(ready) == 3
        for rows in range(1, 9):
            check(torch.randn(rows, 8).half())
            assert len(ready) <= 6
        other = nn.Linear(8, 8).half()  # of a kind that no kernel knows
        assert torch.equal(normalise(x := torch.randn(3, 8).half(), other, {}), other(x))
    normalise(torch.randn(8, 8).half(), norm, ready).sum().backward()
    assert norm.weight.grad.any()


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@torch.no_grad()
def test_a_residual_of_ones_own(interpreted: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added to in place, not under autocast with a weight of another type, nor where it is not one's own."""
    monkeypatch.setattr(skinny, "passes", lambda x: True)
    x, weight = torch.randn(2, 40, 8).bfloat16(), torch.randn(16, 8).bfloat16()
    for own, kind in ((True, weight.dtype), (False, weight.dtype), (True, torch.float32)):
        residual = torch.randn(2, 40, 16).bfloat16()
        want = residual.float() + 0.5 * F.linear(x.float(), weight.float())
        with torch.autocast("cpu", torch.bfloat16):
            got = linear_add(x, Fused(weight.to(kind), None), residual, 0.5, own)
        assert far(got, want) < 6e-3
        assert (got.data_ptr() == residual.data_ptr()) == (own and kind == x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_fp32(dtype: torch.dtype) -> None:
    where = {"dtype": dtype, "device": "cuda"}
    for heads, kvheads, d in ((32, 32, 128), (32, 8, 128), (48, 1, 128), (9, 3, 64), (3, 3, 10), (8, 2, 256)):
        check_rotate(2, 65, heads, kvheads, d, of_rows=False, normed=False, **where)
        check_rotate(3, 33, heads, kvheads, d, of_rows=True, normed=True, **where)
    for kvheads in (1, 4):
        check_place(kvheads, 64, **where)
    for n in (5, 2048, 11008):
        check_glu(65, n, **where)
        check_add_norm(65, n, nn.RMSNorm, **where)
        check_add_norm(3, n, nn.LayerNorm, **where)


@pytest.mark.gpu
@torch.no_grad()
def test_a_thousand_runs_agree() -> None:
    qkv, h = (torch.randn(2, 33, n, device="cuda", dtype=torch.bfloat16) for n in (48 * 128, 2 * 11008))
    angles, norms = Rope(128)(torch.arange(33, device="cuda")[None], 33), norms_of(128, device="cuda")

    def both() -> tuple[Tensor, ...]:
        turned = qkv.clone()
        keys, values = torch.full((2, 2, 8, 40, 128), 3.0, device="cuda", dtype=torch.bfloat16)
        _rotate(turned, 8, 128, angles, norms, (keys, values, 7))
        return turned, keys, values, glu._launch(h, 1)

    once = both()
    for _ in range(1000):
        assert all(map(torch.equal, both(), once))


@pytest.mark.gpu
@pytest.mark.parametrize("kvheads", [1, 2, 8])
@torch.no_grad()
def test_attention_of_many_tokens(kvheads: int) -> None:
    """The packed form, with the pass over its heads, against the one on separate heads."""
    qkv = torch.randn(2, 40, (8 + 2 * kvheads) * 64, device="cuda", dtype=torch.bfloat16)
    angles, norms = Rope(64)(torch.arange(40, device="cuda")[None], 40), norms_of(64, device="cuda")
    want = attend_packed(qkv.float(), kvheads, 64, angles, None, None, norms=norms)
    assert far(attend_packed(qkv.clone(), kvheads, 64, angles, None, None, norms=norms), want) < 1e-2
    mask = torch.ones(40, 40, dtype=torch.bool, device="cuda").tril()[None, None]
    assert far(attend_packed(qkv.clone(), kvheads, 64, angles, mask, None, norms=norms), want) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kvheads", [1, 2])
@torch.no_grad()
def test_scores_of_a_group_under_a_mask_are_not_kept(kvheads: int) -> None:
    qkv = torch.randn(1, 2048, (8 + 2 * kvheads) * 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="cuda").tril()[None, None]
    attend_packed(qkv, kvheads, 64, None, mask, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend_packed(qkv, kvheads, 64, None, mask, None)
    scores = 8 * 2048 * 2048 * 2  # bytes
    assert torch.cuda.max_memory_allocated() - before < scores
