"""torch.compile of the whole model: no graph break, one graph for the prefill and one for all decode steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fms.models import freeze
from fms.utils.generation import generate
from tests.small import small_granite, small_model

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
