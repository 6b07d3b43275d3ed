"""torch.compile of the whole model: no graph break, one graph for the prefill and one for all decode steps."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fms.cli import main
from fms.models import freeze, get_model
from fms.models.compile import BLOCKS, compile_model
from fms.utils.generation import generate
from tests.small import small_granite, small_model
from tests.tiny import write_tiny_chat

# of the compiler itself, which looks for gradients of everything that goes into a graph
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "frozen"), [(None, False), (None, True), ("dynamic", False), ("llama3", True), ("yarn", True)]
)
def test_two_graphs_over_a_generation(kind: str | None, frozen: bool) -> None:
    model = small_granite(rope_scaling=kind and {"kind": kind, "factor": 4.0, "original_max_len": 12})
    if frozen:
        freeze(model)
    want = generate(model, PROMPT, max_new_tokens=10)
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    assert torch.equal(generate(compiled, PROMPT, max_new_tokens=10), want)
    assert counter.frame_count == 2
    generate(compiled, PROMPT, max_new_tokens=10)  # the second time there is nothing left to compile
    assert counter.frame_count == 2


def test_prompts_of_other_lengths_share_a_graph() -> None:
    model = freeze(small_model())
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    for n in (8, 6, 5, 7):
        assert torch.equal(generate(compiled, PROMPT[:, :n], 30), generate(model, PROMPT[:, :n], 30))
    assert counter.frame_count <= 4


def test_rows_of_unequal_lengths_compile() -> None:
    model = freeze(small_granite())
    prompts, options = (
        [[3, 1, 4], [1, 5, 9, 2, 6]],
        {"temperature": 2.0, "eos_token_id": [0, 7, 21], "max_new_tokens": 20},
    )
    want = [row.tolist() for row in generate(model, prompts, **options)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    assert [row.tolist() for row in generate(compiled, prompts, **options)] == want
    assert counter.frame_count <= 3  # a step of rows that differ, and one where some have ended


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_one_pass_and_its_gradients(frozen: bool) -> None:
    model = small_granite()
    compiled: Any = torch.compile(freeze(model) if frozen else model, fullgraph=True, backend="aot_eager")
    logits = compiled(PROMPT)
    torch.testing.assert_close(logits, model(PROMPT))
    if not frozen:
        logits.square().sum().backward()
        got = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        model(PROMPT).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(" " in torch.__file__, reason="the linker that inductor calls takes no path with a space")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of inductor itself
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_inductor_generates_the_same(frozen: bool) -> None:
    model = freeze(small_granite()) if frozen else small_granite()
    want = generate(model, PROMPT, max_new_tokens=10)
    assert torch.equal(generate(torch.compile(model, fullgraph=True), PROMPT, max_new_tokens=10), want)


# compile_model


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts the graphs of compiled blocks, which are compiled fast and must have no graph break."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setitem(BLOCKS, "blocks", {"backend": counter, "fullgraph": True})
    return counter


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    "of",
    [("llama", "micro", {}), ("qwen3", "0.6b", {}), ("mixtral", "8x7b", {"num_experts": 4, "top_k_experts": 2})],
    ids=lambda of: of[0],
)
def test_all_layers_share_the_graphs_of_a_block(of: Any, frozen: bool, counter: Any) -> None:
    architecture, variant, fields = of
    model = small_model(architecture, variant, nlayers=3, **fields)
    if frozen:
        freeze(model)
    want = generate(model, PROMPT, max_new_tokens=10)
    names = list(model.state_dict())
    compile_model(model)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=10), want)
    assert counter.frame_count == 2  # a prompt's and a step's, whatever the number of layers
    generate(model, PROMPT, max_new_tokens=10)
    assert counter.frame_count == 2
    assert list(model.state_dict()) == names


def test_training_of_compiled_blocks(counter: Any) -> None:
    model = small_granite()
    want = gradients(model)
    compile_model(model)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(PROMPT).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_get_model_compiles_and_freeze_keeps_it(counter: Any) -> None:
    model = get_model("llama", "micro", nlayers=2, compile="blocks")
    model(PROMPT)
    assert counter.frame_count == 1
    freeze(model)
    model(PROMPT)
    assert counter.frame_count == 2  # the frozen block's
    plain = compile_model(deepcopy(model), "none")
    plain(PROMPT)
    assert counter.frame_count == 2


def test_generate_compiles(counter: Any) -> None:
    model = freeze(small_granite())
    want = generate(model, PROMPT, max_new_tokens=10)
    for _ in range(2):
        assert torch.equal(generate(model, PROMPT, max_new_tokens=10, compile="blocks"), want)
        assert counter.frame_count == 2  # a prompt's and a step's
    assert model.compiled == "blocks"
    assert torch.equal(generate(model, PROMPT, max_new_tokens=10, compile="none"), want)
    assert model.compiled == "none"


def test_the_command_compiles(counter: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["generate", "The quick", "--model_path", str(write_tiny_chat(tmp_path / "chat")), "--max_new_tokens", "8"]
    said = []
    for mode in ("none", "blocks"):
        assert main([*words, "--device_type", "cpu", "--compile", mode]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert counter.frame_count == 2


def test_an_encoder_of_compiled_blocks(counter: Any) -> None:
    model = get_model("roberta", "micro").eval()
    want = model(PROMPT)
    torch.testing.assert_close(compile_model(model)(PROMPT), want)
    assert counter.frame_count == 1


def test_the_whole_forward_in_torchs_own_mode() -> None:
    model = compile_model(small_granite(), "default")
    assert model._compiled_call_impl is not None
    assert all(block._compiled_call_impl is None for block in model.layers)
    compile_model(model, "none")
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    "build",
    [
        lambda mode: compile_model(small_granite(), mode),
        lambda mode: get_model(compile=mode),
        lambda mode: generate(small_granite(), PROMPT, compile=mode),
    ],
)
def test_a_mode_that_is_not_known(build: Any) -> None:
    with pytest.raises(ValueError, match=r"compile='block' is not known \(did you mean 'blocks'\?\); there are none"):
        build("block")


@pytest.mark.skipif(" " in torch.__file__, reason="the linker that inductor calls takes no path with a space")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of inductor itself
@pytest.mark.parametrize("mode", ["blocks", "max"])
def test_inductor_compiles_blocks(mode: str) -> None:
    model = freeze(small_granite())
    want = generate(model, PROMPT, max_new_tokens=10)
    assert torch.equal(generate(compile_model(model, mode), PROMPT, max_new_tokens=10), want)
