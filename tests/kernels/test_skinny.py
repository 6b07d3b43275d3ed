"""Linear layers of few rows: the kernels against fp32, every form, odd sizes, poisoned outputs, again and again."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms.kernels import launching, skinny
from fms.kernels.launching import Machine, machine
from fms.kernels.norm_linear import norm_linear
from fms.kernels.skinny import (
    FUNCTIONS,
    Choice,
    activation_kind,
    apply,
    choose,
    norm_kind,
    parts,
    prepare,
    reference,
    serves,
)
from fms.modules.feedforward import ACTIVATIONS
from fms.modules.frozen import Fused
from tests.kernels.poison import poison

STREAM = Choice("stream", {"KP": 128, "KQ": 1, "BN": 2, "GRID": 3, "STAGES": 2}, 4)
PARTS = Choice("stream", {"KP": 64, "KQ": 64, "BN": 2, "GRID": 3, "STAGES": 2}, 4)
WALK = Choice("walk", {"BK": 64, "BN": 4, "STAGES": 0}, 4)
LOOP = Choice("walk", {"BK": 64, "BN": 4, "STAGES": 2}, 4)
TILE = Choice("tile", {"BK": 64, "BN": 16, "STAGES": 3, "M": 16}, 2)
KINDS = (None, nn.RMSNorm, nn.LayerNorm)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, device: Any = None) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def case(
    rows: int, n: int, k: int, kind: type | None, *, bias: bool, add: bool, gated: bool, act: int, **where: Any
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of `launch`, and what it must give, computed in fp32."""
    x = random(rows, k, **where) * 2 + 0.5
    w = random(n * (1 + gated), k, **where) * k**-0.5
    given: dict[str, Any] = {"x": x, "weight": w, "gated": gated, "activation": act}
    h = x.float()
    if kind is not None:
        norm = kind(k, eps=1e-5, **where)
        with torch.no_grad():
            for p in norm.parameters():
                p.normal_(1.0, 0.3)
        given |= {"norm": norm_kind(norm), "norm_weight": norm.weight.clone(), "eps": 1e-5}
        given["norm_bias"] = norm.bias.clone() if kind is nn.LayerNorm else None
        h = norm.float()(h)
    b = random(len(w), **where) if bias else None
    y = F.linear(h, w.float(), None if b is None else b.float())
    function = FUNCTIONS[act]
    y = function(y[:, :n]) * y[:, n:] if gated else function(y)
    if add:
        given |= {"residual": random(rows, n, **where), "scale": 0.7}
        y = given["residual"].float() + 0.7 * y
    return given | {"bias": b}, y


def launch(x: Tensor, weight: Tensor, residual: Tensor | None = None, **how: Any) -> Tensor:
    return prepare(x, weight, residual=residual, **how)(x, residual)


def far(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def forms(rows: int, kind: type | None) -> list[Choice]:
    tile = TILE._replace(sizes=TILE.sizes | {"M": 32 if rows > 16 else 16})
    if rows > 2:
        return [] if kind is not None else [tile]
    return {
        None: [STREAM, PARTS, WALK, LOOP, tile],
        nn.RMSNorm: [STREAM, PARTS, WALK, LOOP],
        nn.LayerNorm: [STREAM, PARTS],
    }[kind]


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter itself
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 21, 100), (2, 33, 128), (3, 17, 70), (17, 40, 128)])
@torch.no_grad()
def test_interpreted(kind: type | None, rows: int, n: int, k: int, interpreted: torch.device) -> None:
    for gated, (act, bias, add) in product((False, True), ((0, False, True), (1, True, False), (3, True, True))):
        how = {"bias": bias, "add": add, "gated": gated, "act": act, "dtype": torch.float16, "device": interpreted}
        given, want = case(rows, n, k, kind, **how)
        for choice in [*forms(rows, kind), None]:
            assert far(launch(**given, choice=choice), want) < 3e-3, (how, choice)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reference(kind: type | None) -> None:
    for gated, act in product((False, True), range(5)):
        how = {"bias": act % 2 == 0, "add": act > 1, "gated": gated, "act": act, "dtype": torch.float32}
        given, want = case(3, 17, 40, kind, **how)
        torch.testing.assert_close(reference(**given), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 32])
@torch.no_grad()
def test_against_fp32(rows: int, dtype: torch.dtype) -> None:
    options = [(None, False, 0, False, True), (nn.RMSNorm, True, 1, False, False), (nn.LayerNorm, False, 3, True, True)]
    options += [(nn.RMSNorm, False, 2, True, False), (nn.LayerNorm, True, 4, False, True)]
    for (n, k), (kind, gated, act, bias, add) in product([(256, 512), (333, 1000), (77, 9000)], options):
        how = {"bias": bias, "add": add, "gated": gated, "act": act, "dtype": dtype, "device": "cuda"}
        given, want = case(rows, n, k, kind, **how)
        poison(*want.shape, dtype=dtype, device="cuda")
        if kind is not None:
            poison(rows, k, dtype=dtype, device="cuda")  # normalised rows
        assert far(launch(**given), want) < 6e-3, (n, k, how)


@pytest.mark.filterwarnings("ignore:Conversion of an array")
@pytest.mark.parametrize("rows", [2, 3])
@torch.no_grad()
def test_what_was_prepared_serves_others_like_it(
    rows: int, interpreted: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skinny, "serves", lambda x, weight: True)
    again_on(interpreted, rows, torch.float16, 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 32])
def test_launched_again_by_hand(rows: int) -> None:
    with torch.no_grad():
        again_on(torch.device("cuda", 0), rows, torch.bfloat16, 6e-3)
    x = random(rows, 128, device="cuda").requires_grad_()
    linear = Fused(random(33, 128, device="cuda"), None)
    assert apply(x.detach(), linear) is not None
    assert linear.ready
    assert apply(x, linear) is None  # its gradient is asked for


def again_on(device: torch.device, rows: int, dtype: torch.dtype, near: float) -> None:
    """A layer with each of several inputs and residuals, some of which begin at odd addresses or are strided."""
    where = {"dtype": dtype, "device": device}
    norm = nn.RMSNorm(128, eps=1e-5, **where)
    norm.weight.normal_(1.0, 0.3)
    linear = Fused(random(33, 128, **where), random(33, **where))
    for turn in range(6):
        x = random(rows * 128 + 1, **where)[turn % 2 :][: rows * 128].view(rows, 128)
        if turn == 4:
            x = random(rows, 256, **where)[:, ::2]
        residual = random(rows * 33 + 1, **where)[turn // 2 % 2 :][: rows * 33].view(rows, 33) if turn else None
        got = apply(x, linear, norm, 1, residual=residual, scale=0.7)
        h = F.rms_norm(x.float(), (128,), norm.weight.float(), 1e-5)
        want = F.silu(F.linear(h, linear.weight.float(), linear.bias.float()))  # type: ignore[union-attr]
        assert got is not None
        assert far(got, want if residual is None else residual.float() + 0.7 * want) < near, turn
    assert len(linear.ready) == 2  # with a residual and without one
    x = random(rows, 128, **where)
    apply(x, linear, norm)
    for change in (lambda: setattr(norm, "weight", nn.Parameter(norm.weight * 3)), norm.float, norm.half):
        change()
        h = F.rms_norm(x.float(), (128,), norm.weight.float(), norm.eps)
        want = F.linear(h, linear.weight.float(), linear.bias.float())  # type: ignore[union-attr]
        for _ in range(2):
            assert far(apply(x, linear, norm), want) < near  # type: ignore[arg-type]
        norm.eps = 2.0  # type: ignore[assignment]
    assert apply(random(1, rows, 128, **where), linear, norm, 1).shape == (1, rows, 33)  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [512, 3000])
@pytest.mark.parametrize("rows", [1, 2, 8, 32])
@torch.no_grad()
def test_a_thousand_runs_agree(rows: int, width: int) -> None:
    """In chains, where each kernel is launched before the one ahead has ended; every form is in one of them."""
    how = {"dtype": torch.bfloat16, "device": "cuda", "bias": False}
    first, _ = case(rows, width, width, nn.RMSNorm, gated=True, act=1, add=False, **how)
    second, _ = case(rows, width, width, None, gated=False, act=0, add=True, **how)

    def chain() -> Tensor:
        h = second["residual"]
        for _ in range(8):
            h = launch(**(second | {"x": launch(**(first | {"x": h})), "residual": h}))
        return h

    once = chain()
    assert once.isfinite().all()
    for _ in range(1000):
        assert torch.equal(chain(), once)


def test_what_is_served() -> None:
    x, w = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)
    assert not serves(x, w)  # on a CPU
    assert [activation_kind(ACTIVATIONS[name]) for name in ("silu", "gelu", "gelu_tanh", "relu")] == [1, 2, 3, 4]
    assert activation_kind(torch.tanh) is None
    assert norm_kind(None) == 0
    assert norm_kind(nn.RMSNorm(4)) == 1
    assert norm_kind(nn.LayerNorm(4)) == 2
    assert norm_kind(nn.LayerNorm(4, bias=False)) is None
    assert norm_kind(nn.RMSNorm(4, elementwise_affine=False)) is None


@pytest.mark.parametrize("rows", range(1, 33))
def test_every_shape_has_a_choice(rows: int) -> None:
    for n, k, norm, gated in product((5, 4096, 128_256), (7, 3000, 4096, 5120, 14_336), (0, 1, 2), (False, True)):
        choice = choose(rows, n, k, norm, gated, Machine(132, True))
        if choice is None:
            assert norm
            continue
        assert choice.form == "tile" or rows <= 2
        assert choice.sizes.get("KP", k) + choice.sizes.get("KQ", 0) >= k
        assert choice.sizes.get("M", rows) >= rows


@pytest.mark.parametrize("k", [1, 2047, 2048, 2049, 3073, 4097, 6144, 8191, 8193, 12_289, 16_385])
def test_no_column_is_left_out(k: int) -> None:
    read = parts(k)
    assert read["KP"] + (read["KQ"] if read["KQ"] > 1 else 0) >= k  # 1: a second part there is not


@pytest.mark.parametrize("shared", [100 << 10, 164 << 10, 228 << 10])
def test_programs_that_stay_fit_on_a_multiprocessor(shared: int) -> None:
    widths = (64, 576, 2048, 4096, 5120, 5504, 8192, 11_008, 13_824, 16_384, 28_672)
    for n, k, norm, gated in product((128, 4096, 14_336, 128_256), widths, (0, 1), (False, True)):
        choice = choose(2, n, k, norm, gated, Machine(128, True, shared))
        assert choice is not None
        if choice.form != "stream":
            continue
        sizes, each = choice.sizes, choice.sizes["GRID"] // 128
        width = sizes["KP"] + (sizes["KQ"] if sizes["KQ"] > 1 else 0)
        fetched = (sizes["STAGES"] - 1) * sizes["BN"] * width * (1 + gated) * 2
        assert each >= 1
        assert each * fetched < shared


def test_a_compiler_knows_a_machine_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 7)
    monkeypatch.setattr(launching, "_machines", {})
    run = torch.compile(lambda x: x + (machine(device) is not None), fullgraph=True, backend="eager")
    assert run(torch.zeros(1)) == 0
    launching._machines[device] = Machine(132, True)
    assert run(torch.zeros(1)) == 1


def test_a_compiler_is_not_asked_how_many_rows() -> None:
    """Where no kernel would take them: one graph serves few and many."""
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    linear, norm = Fused(torch.randn(24, 16), None), nn.RMSNorm(16)
    run = torch.compile(lambda x: norm_linear(x, norm, linear), backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (5, 7, 40, 100, 3):
            run(torch.randn(rows, 16))
    assert len(graphs) == 1
