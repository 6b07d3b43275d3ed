"""One new token over a cache: the kernel against fp32 attention, every ratio of heads, odd widths, rings."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms.kernels import attend as kernel
from fms.kernels.attend import PART, Scratch, Step, attend, attend_packed, rotate, serves_flash
from fms.kernels.launching import Machine, _machines
from fms.modules.positions import Rope
from tests.kernels.poison import poison


def far(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def check(
    kvheads: int,
    group: int,
    d: int,
    places: list[int],
    slots: int,
    *,
    capacity: int | None = None,
    rope: bool = True,
    normed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: Any = "cuda",
) -> None:
    """Rows that hold `places` tokens get one more; slots that hold none, room for parts and outputs are poisoned."""
    b, capacity = len(places), capacity or slots
    k, v = (torch.randn(b, kvheads, slots, d, device=device).to(dtype) for _ in "kv")
    for row, place in enumerate(places):
        k[row, :, min(place, capacity) :] = float("nan")
        v[row, :, min(place, capacity) :] = float("nan")
    before = k.clone(), v.clone()
    qkv = torch.randn(b, 1, (group + 2) * kvheads * d, device=device).to(dtype)
    same = len(set(places)) == 1
    positions = torch.tensor(places[:1] if same else places, device=device)
    angles = Rope(d)(positions[:, None], slots) if rope else None
    norms = None
    if normed:
        norms = tuple(nn.RMSNorm(d, eps=1e-6, device=device, dtype=dtype) for _ in "qk")
        for norm in norms:
            norm.weight.data.normal_(1, 0.3)
    step = Step(positions, capacity, Scratch(k, group), even=False)
    step.scratch.parts.fill_(float("nan"))
    poison(b, 1, group * kvheads * d, dtype=dtype, device=device)
    layer: Any = SimpleNamespace(k=k, v=v, step=step)
    got = attend_packed(qkv, kvheads, d, angles, None, layer, 0.2, norms=norms)
    assert (step.scratch.counts == 0).all()

    heads = qkv.float().view(b, 1, -1, d)
    q, new, nv = heads.split((group * kvheads, kvheads, kvheads), 2)
    if norms is not None:
        q, new = norms[0].float()(q), norms[1].float()(new)
    if angles is not None:
        q, new = rotate(q, angles), rotate(new, angles)
    want = []
    for row, place in enumerate(places):
        slot = place % capacity
        held = [s for s in range(min(place, capacity)) if s != slot]
        kk = torch.cat((before[0][row, :, held].float(), new[row].transpose(0, 1)), 1)
        vv = torch.cat((before[1][row, :, held].float(), nv[row].transpose(0, 1)), 1)
        one = F.scaled_dot_product_attention(q[row].transpose(0, 1), kk, vv, scale=0.2, enable_gqa=True)
        want.append(one.flatten())
        assert far(k[row, :, slot], new[row, 0]) < 6e-3
        assert torch.equal(v[row, :, slot], nv[row, 0].to(dtype))
        rest = [s for s in range(slots) if s != slot]
        assert torch.equal(k[row, :, rest].nan_to_num(7), before[0][row, :, rest].nan_to_num(7))
    assert far(got[:, 0], torch.stack(want)) < 1e-2, (kvheads, group, d, places)


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter itself
@pytest.mark.parametrize(("kvheads", "group", "d"), [(2, 1, 16), (1, 5, 24), (2, 4, 10), (1, 18, 10)])
@torch.no_grad()
def test_interpreted(kvheads: int, group: int, d: int, interpreted: torch.device) -> None:
    for normed, rope in ((False, True), (True, True), (False, False)):
        check(kvheads, group, d, [0, 3, 150], 200, normed=normed, rope=rope, dtype=torch.float16, device="cpu")
    check(kvheads, group, d, [64, 64], 130, dtype=torch.float16, device="cpu")
    check(kvheads, group, d, [2, 90, 170], 91, capacity=90, dtype=torch.float16, device="cpu")


class OnAGpu(Tensor):
    is_cuda = True


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("s", [1, 3])
@torch.no_grad()
def test_autocast_and_a_cache_of_another_type(types: Any, s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are asked by name do without autocast, which makes the types alike."""
    monkeypatch.setitem(_machines, torch.device("cpu"), Machine(1, False))
    q, k = (torch.randn(2, s, 4, 8).to(dtype).as_subclass(OnAGpu) for dtype in types)  # type: ignore[attr-defined]
    layer: Any = SimpleNamespace(update=lambda *new: (k.transpose(1, 2),) * 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(q, k, k, None, None, layer)
    t, h = (x.float().transpose(1, 2) for x in (q, k))
    want = F.scaled_dot_product_attention(t, h, h, is_causal=True)
    torch.testing.assert_close(got.float(), want.transpose(1, 2).flatten(2), rtol=2e-2, atol=2e-2, check_dtype=False)


def check_slots_to_come(device: str, dtype: torch.dtype, near: float) -> None:
    """Causal attention to the first slots of more, as transformers' static cache gives them to a prompt."""
    q, k, v = (torch.randn(2, 9, heads, 16, device=device, dtype=dtype) for heads in (4, 2, 2))
    slots = [F.pad(x.transpose(1, 2), (0, 0, 0, 11), value=3.0) for x in (k, v)]
    layer: Any = SimpleNamespace(update=lambda *new: slots)
    wide = (x.float().transpose(1, 2) for x in (q, k, v))
    want = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v, None, None, layer).float(), want, rtol=near, atol=near)


@torch.no_grad()
def test_slots_to_come_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "serves_flash", lambda keys: True)  # a CPU has no kernel of that name: it would raise
    check_slots_to_come("cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_slots_to_come_are_not_seen_on_a_gpu(dtype: torch.dtype) -> None:
    check_slots_to_come("cuda", dtype, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_against_fp32(dtype: torch.dtype) -> None:
    shapes = [(32, 1, 128), (8, 4, 128), (1, 48, 128), (2, 12, 48), (1, 5, 96), (2, 8, 256), (3, 3, 10)]
    if dtype == torch.float16:
        shapes = shapes[1:4]
    for (kvheads, group, d), places in product(shapes, ([512, 512], [0, 1, 63, 64, 65, 700], [999])):
        check(kvheads, group, d, places, 1000, dtype=dtype)
    for shape in shapes[:2]:
        check(*shape, [0, 5, 640], 1024, normed=True, dtype=dtype)
        check(*shape, [0, 5, 640], 1024, rope=False, dtype=dtype)
        check(*shape, [3, 299, 300, 301, 1000], 301, capacity=300, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("kvheads", "group"), [(32, 1), (8, 4), (1, 48)])
@torch.no_grad()
def test_a_thousand_runs_agree(kvheads: int, group: int) -> None:
    k, v = (torch.randn(2, kvheads, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    step = Step(torch.tensor([2000, PART + 1], device="cuda"), 2048, Scratch(k, group), even=False)
    qkv = torch.randn(2, 1, (group + 2) * kvheads * 128, device="cuda", dtype=torch.bfloat16)
    layer: Any = SimpleNamespace(k=k, v=v, step=step)
    once = attend_packed(qkv, kvheads, 128, None, None, layer)
    for _ in range(1000):
        assert torch.equal(attend_packed(qkv, kvheads, 128, None, None, layer), once)


def test_a_shape_that_comes_often_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "OFTEN", 3)
    monkeypatch.setattr(kernel, "_calls", {})
    q, k = torch.zeros(1, 4, 7, 8), torch.zeros(1, 2, 7, 8)
    assert [kernel._comes_often(q, k) for _ in range(5)] == [False, False, False, True, True]
    assert not kernel._comes_often(q, q)  # another number of key heads
    assert not kernel._comes_often(q[:, :, :5], k)
    with kernel.planned():
        assert kernel._comes_often(q[:, :, :6], k)
    assert not kernel._comes_often(q[:, :, :6], k)
    for s in range(6):  # more shapes than are worth keeping
        kernel._comes_often(q[:, :, :s], q)
    assert len(kernel._calls) <= 4


@pytest.mark.gpu
@torch.no_grad()
def test_planned_attention_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "OFTEN", 1)
    monkeypatch.setattr(kernel, "_calls", {})
    q, k, v = (torch.randn(2, 300, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    once, again = (attend(q, k, v, None, None, None) for _ in range(2))
    assert kernel._calls == {(q.device, q.dtype, (2, 8, 300, 128), 2): 2}
    torch.testing.assert_close(once.float(), again.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("kvheads", "group", "d"), [(4, 1, 64), (2, 4, 128), (1, 48, 128), (2, 1, 200), (2, 3, 72)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_later_tokens_without_a_mask(kvheads: int, group: int, d: int, dtype: torch.dtype) -> None:
    for before, s in ((130, 70), (1, 5), (2048, 300), (0, 300)):
        q = torch.randn(2, s, group * kvheads, d, device="cuda", dtype=dtype)
        k, v = (torch.randn(2, kvheads, before + s, d, device="cuda", dtype=dtype) for _ in "kv")
        layer: Any = SimpleNamespace(later=True, update=lambda *new, k=k, v=v: (k, v))
        assert serves_flash(k)
        got = attend(q, k[:, :, -s:].transpose(1, 2), v[:, :, -s:].transpose(1, 2), None, None, layer, 0.1)
        seen = torch.ones(s, before + s, dtype=torch.bool, device="cuda").tril(before)
        wide = [t.float().repeat_interleave(group, 1) for t in (k, v)]
        want = F.scaled_dot_product_attention(q.float().transpose(1, 2), *wide, seen, scale=0.1)
        torch.testing.assert_close(got.float(), want.transpose(1, 2).flatten(2), rtol=2e-2, atol=2e-2)
