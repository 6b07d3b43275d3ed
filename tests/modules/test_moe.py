"""Mixtures of experts against transformers' own, gradients and compiled forms included."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fms.kernels import grouped_linear as kernel
from fms.kernels.grouped_linear import grouped_linear
from fms.modules.attention import Attention
from fms.modules.block import Block
from fms.modules.frozen import FrozenBlock
from fms.modules.moe import Experts, MixtureOfExperts, SharedExpert

EMB, HIDDEN, EXPERTS, K = 16, 24, 6, 2


def mixture(gate: float = 0.3) -> MixtureOfExperts:
    layer = MixtureOfExperts(EMB, HIDDEN, EXPERTS, K)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(layer.gate.weight, std=gate)
    return layer


def plain(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """All experts of all tokens, those that were not chosen with the weight 0."""
    probabilities = layer.gate(x).softmax(-1)
    least = probabilities.topk(K).values[..., -1:]
    weights = probabilities * (probabilities >= least)
    weights = weights / weights.sum(-1, keepdim=True)
    experts = layer.experts
    hidden = F.silu(torch.einsum("bsd,ehd->bseh", x, experts.wg)) * torch.einsum("bsd,ehd->bseh", x, experts.w1)
    return torch.einsum("bseh,edh,bse->bsd", hidden, experts.w2, weights)


def gradients(layer: torch.nn.Module, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    names = ["x", *(name for name, _ in layer.named_parameters())]
    towards = torch.linspace(-1, 1, out.numel()).view_as(out)
    return dict(zip(names, torch.autograd.grad(out, (x, *layer.parameters()), towards), strict=True))


def same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        assert (got[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_names_and_shapes_of_parameters() -> None:
    shapes = {name: tuple(value.shape) for name, value in SharedExpert(EMB, 8, mixture()).state_dict().items()}
    assert shapes == {
        "wg.weight": (8, EMB),
        "w1.weight": (8, EMB),
        "w2.weight": (EMB, 8),
        "routed.gate.weight": (EXPERTS, EMB),
        "routed.experts.wg": (EXPERTS, HIDDEN, EMB),
        "routed.experts.w1": (EXPERTS, HIDDEN, EMB),
        "routed.experts.w2": (EXPERTS, EMB, HIDDEN),
    }


@pytest.mark.parametrize("gate", [0.05, 1.0, 60.0], ids=lambda std: f"gate {std}")
@pytest.mark.parametrize("family", ["mixtral", "granitemoehybrid"])
def test_it_is_what_transformers_computes(family: str, gate: float) -> None:
    """Also where the router is so sure that probabilities underflow, and so unsure that all are alike."""
    transformers = pytest.importorskip("transformers")
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Theirs

        config = transformers.MixtralConfig(hidden_size=EMB, intermediate_size=HIDDEN, num_local_experts=EXPERTS)
    else:
        from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE as Theirs

        config = transformers.GraniteMoeHybridConfig(
            hidden_size=EMB, intermediate_size=HIDDEN, num_local_experts=EXPERTS, mamba_n_heads=2
        )
    config._experts_implementation = "eager"
    ours, theirs = mixture(gate), Theirs(config).eval()
    router = theirs.gate if family == "mixtral" else theirs.router
    with torch.no_grad():
        router.weight.copy_(ours.gate.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat((ours.experts.wg, ours.experts.w1), 1))
        theirs.experts.down_proj.copy_(ours.experts.w2)
    x = torch.randn(3, 11, EMB, requires_grad=True)
    out, want = ours(x), theirs(x)
    assert want.std() > 0.5
    torch.testing.assert_close(out, want, atol=2e-6, rtol=0)
    if gate == 60:
        return  # Mixtral's normalised softmax cancels in its gradient: 1.3e-4 of what is then almost zero

    towards = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, ours.gate.weight, ours.experts.w2), towards)
    expected = torch.autograd.grad(want, (x, router.weight, theirs.experts.down_proj), towards)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("tokens", [1, 7])
def test_gradients(tokens: int) -> None:
    layer = mixture()
    x = torch.randn(2, tokens, EMB, requires_grad=True)
    out, want = layer(x), plain(layer, x)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=0)
    same_gradients(gradients(layer, out, x), gradients(layer, want, x))


def test_experts_without_tokens_take_no_part() -> None:
    layer = mixture()
    x = torch.rand(1, 5, EMB) + 0.1
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([1.0, -1, 0, 2, -2, -3])[:, None].expand(-1, EMB))  # 3 and 0 for all
        for weight in layer.experts.parameters():
            weight[[1, 2, 4, 5]] = torch.nan
    out = layer(x)
    assert out.isfinite().all()
    out.sum().backward()
    for weight in layer.experts.parameters():
        assert weight.grad is not None
        assert [bool(gradient.any()) for gradient in weight.grad] == [True, False, False, True, False, False]


@torch.no_grad()
def test_a_token_is_routed_alone_as_in_a_batch() -> None:
    layer = mixture()
    x = torch.randn(4, 9, EMB)
    whole = layer(x)
    for i in range(4):
        for j in range(9):
            torch.testing.assert_close(layer(x[i : i + 1, j : j + 1])[0, 0], whole[i, j], atol=2e-6, rtol=0)


@torch.no_grad()
def test_fused_is_the_same_under_the_same_names() -> None:
    layer = SharedExpert(EMB, 8, mixture())
    x = torch.randn(2, 9, EMB)
    want, state = layer(x), {name: value.clone() for name, value in layer.state_dict().items()}
    layer.fuse()
    torch.testing.assert_close(layer(x), want, atol=2e-6, rtol=0)
    experts = layer.routed.experts
    assert isinstance(experts, Experts)
    assert experts.fused is not None
    assert experts.wg.data_ptr() == experts.fused.data_ptr()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@torch.no_grad()
def test_bfloat16() -> None:
    layer = mixture().bfloat16()
    x = torch.randn(4, 33, EMB).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = layer.float()(x.float())
    assert (out.float() - exact).pow(2).mean().sqrt() < 0.01 * exact.std()


def test_compiled_there_is_no_graph_break_and_the_same_gradients() -> None:
    torch._dynamo.reset()
    layer = mixture()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (1, 2, 7):
        x = torch.randn(2, tokens, EMB, requires_grad=True)
        out, want = compiled(x), layer(x)
        torch.testing.assert_close(out, want, atol=1e-6, rtol=0)
        same_gradients(gradients(layer, out, x), gradients(layer, want, x))


ENDS = torch.tensor([3, 3, 7, 10], dtype=torch.int32)


def grouped(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x, weight = torch.randn(10, EMB), torch.randn(4, HIDDEN, EMB)
    x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
    return x, weight, ENDS.to(device)


def test_the_loop_as_one_operation_keeps_the_rules_of_operations() -> None:
    torch.library.opcheck(kernel._opaque, grouped())
    y = torch.randn(10, HIDDEN)
    torch.library.opcheck(kernel._outer, (y, grouped()[0].detach(), ENDS))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # autograd's thread is the first to use it
@pytest.mark.parametrize("few", [True, False], ids=["few rows", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "FEW", 256 if few else 0)
    x, weight, ends = grouped(dtype, "cuda")
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    exact = torch.cat([a @ b.mT for a, b in zip(x.double().split(sizes), weight.double(), strict=True)])
    out = grouped_linear(x, weight, ends)
    towards = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, (x, weight), towards))
    want = (exact, *torch.autograd.grad(exact, (x, weight), towards.double()))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < {torch.float32: 1e-3}.get(dtype, 2e-2) * b.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_decode_step_waits_for_nothing(dtype: torch.dtype) -> None:
    """It can be captured as a graph, and replayed for tokens that other experts are chosen for."""
    layer = mixture().to("cuda", dtype)
    layer.fuse()
    x = torch.randn(1, 1, EMB, device="cuda", dtype=dtype)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for _ in range(5):
        x.copy_(torch.randn(1, 1, EMB))
        graph.replay()
        torch.testing.assert_close(out, layer(x), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@torch.no_grad()
def test_a_frozen_block_takes_a_mixture(shared: bool) -> None:
    ff = SharedExpert(EMB, 8, mixture()) if shared else mixture()
    ln, ff_ln = (torch.nn.RMSNorm(EMB, eps=1e-5) for _ in range(2))
    block = Block(ln, Attention(EMB, 2, 1, 8), ff_ln, ff, 0.6)
    x = torch.randn(2, 5, EMB)
    want = block(x, None)
    frozen = FrozenBlock(block)
    torch.testing.assert_close(frozen(x, None), want, atol=2e-6, rtol=0)
    for copy in (deepcopy(frozen), deepcopy(frozen).double()):  # both have fused weights of their own
        state = frozen.state_dict()
        for name, parameter in copy.named_parameters():
            assert torch.equal(parameter.float(), state[name])
        for parameter in copy.ff.parameters():
            parameter.mul_(0.5)
        dtype = copy.ln.weight.dtype
        assert not torch.allclose(copy(x.to(dtype), None).float(), want, atol=1e-2)
    torch.testing.assert_close(frozen(x, None), want, atol=2e-6, rtol=0)
