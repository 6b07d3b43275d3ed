"""Prompts that go in as one graph leave what they leave when each kernel is launched by itself, or alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fms.kernels import attend as attention
from fms.models import Decoder, freeze
from fms.utils import capture as capturing
from fms.utils.capture import CapturedStep, keep, kept
from fms.utils.generation import generate
from fms.utils.sampling import Sampling
from tests.small import small_model
from tests.utils.test_capture import MODELS, Played, gpu, on_gpu

ROWS = ([[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]], [[8] * 32, [9, 7] * 10, [2]], [[2] * 33] * 3, [[7, 9, 3]] * 3)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "OFTEN", 2)
    monkeypatch.setattr(capturing, "WIDTH", 32)


def padded(rows: list[list[int]], device: str = "cpu") -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True)


def check(model: Decoder, step: CapturedStep, rows: list[list[int]], device: str, near: float) -> None:
    """Logits of the prompts, and behind one token more: those of each row by itself."""
    lengths = [len(row) for row in rows]
    step.cache.hold([0] * len(rows))
    span = step.cache.span = torch.tensor([[n + 9] for n in lengths], device=device)
    with torch.inference_mode():
        logits = step.prefill(padded(rows, device), lengths)
        assert logits is not None
        logits = logits.clone()
        assert step.cache.held() == lengths
        later = model(torch.full((len(rows), 1), 6, device=device), cache=step.cache)[:, -1]
        for row, (tokens, first, second) in enumerate(zip(rows, logits, later, strict=True)):
            for got, ids in ((first, tokens), (second, [*tokens, 6])):
                alone = model(torch.tensor([ids], device=device), cache=model.no_cache(span[row : row + 1]))[0, -1]
                torch.testing.assert_close(got, alone, rtol=near, atol=near)


def prompts_come_again(model: Decoder, made: type[CapturedStep], device: str, near: float) -> CapturedStep:
    step = made(model, model.make_cache(3, 46))
    for rows in (*ROWS[:2], ROWS[1], ROWS[3], ROWS[0]):
        check(model, step, rows, device, near)
    assert list(step.prompts) == [32]
    assert step.prompts[32].graph is not None
    return step


@pytest.mark.parametrize("name", ["llama", "granite", "gpt_bigcode", "qwen3", "dynamic"])
def test_prompts_come_again(name: str) -> None:
    prompts_come_again(freeze(MODELS[name]()), Played, "cpu", 2e-5)


@gpu
@pytest.mark.parametrize("name", ["llama", "granite", "gpt_bigcode", "qwen3", "dynamic"])
def test_prompts_come_again_on_a_gpu(name: str) -> None:
    prompts_come_again(on_gpu(name), CapturedStep, "cuda", 2e-4)
    step = prompts_come_again(on_gpu(name, torch.bfloat16), CapturedStep, "cuda", 0.5)
    ids = padded(ROWS[1], "cuda")
    found = []
    with torch.inference_mode():
        for graph in (step.prompts[32].graph, None):
            step.prompts[32].graph = graph
            step.cache.hold([0] * 3)
            logits = step.prefill(ids, [32, 20, 1])
            assert logits is not None
            found.append([logits.clone(), *(t.clone() for layer in step.cache.layers for t in (layer.k, layer.v))])
    assert all(map(torch.equal, *found)), "a graph gives other bits than plain launches of the same prompts"


class Watched(Played):
    """Notes of each pass whether its attention is planned."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.planned: list[bool] = []

    def _prefill(self, prompts: capturing.Prompts) -> None:
        self.planned.append(attention._planned.get())
        super()._prefill(prompts)


def test_a_width_is_captured_once_it_has_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "OFTEN", 4)
    model = freeze(small_model())
    step = Watched(model, model.make_cache(3, 46))
    for rows, graphs in ((ROWS[0], 0), (ROWS[3], 0), (ROWS[2], 0), (ROWS[0], 0), (ROWS[3], 1), (ROWS[0], 1)):
        check(model, step, rows, "cpu", 2e-5)
        assert sum(prompts.graph is not None for prompts in step.prompts.values()) == graphs
    assert {width: prompts.times for width, prompts in step.prompts.items()} == {32: 5, 46: 1}
    assert step.planned == [False] * 4 + [True, False]  # then what was captured, played


def test_padding_has_room() -> None:
    model = freeze(small_model("gpt_bigcode"))
    for length, slack, rows, width in ((31, 0, ROWS[0], 31), (48, 0, ROWS[2], 48), (48, 20, ROWS[2], 48)):
        step = Played(model, model.make_cache(3, length, slack))
        for _ in range(2):
            check(model, step, rows, "cpu", 2e-5)
        assert list(step.prompts) == [width]


def test_other_weights_take_other_graphs() -> None:
    model = freeze(small_model())
    step = prompts_come_again(model, Played, "cpu", 2e-5)
    step.begin(torch.tensor([1, 2, 3]), [40] * 3)
    step.replay()
    keep(step)
    model.embedding.weight.data = model.embedding.weight.data * 2
    again = kept(model, 3, 46, Sampling(), ())
    assert again is step
    assert step.prompts[32].graph is None
    check(model, step, ROWS[0], "cpu", 2e-5)
    assert step.prompts[32].graph is not None


def test_what_is_left_to_plain_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: Decoder) -> bool:
        step = Played(model, model.make_cache(3, 46))
        refused = step.prefill(padded(ROWS[0]), [3, 7, 1]) is None
        assert not refused or (step.cache.held() == [0] * 3 and not step.prompts)
        return refused

    model = freeze(small_model())
    with torch.inference_mode():
        assert not refuses(model)
        assert refuses(freeze(MODELS["mixtral"]())), "the host may wait for its experts"
        assert refuses(freeze(MODELS["mistral, window"]())), "what a ring holds has moved on"
        weights = sum(p.numel() for p in model.layers[0].parameters())
        monkeypatch.setattr(capturing, "LAUNCHED_LATE", 3 * 32 * weights)
        assert not refuses(model)
        monkeypatch.setattr(capturing, "LAUNCHED_LATE", 3 * 32 * weights - 1)
        assert refuses(model), "the device takes longer than the host"
        monkeypatch.undo()
        model.compiled = "blocks"  # type: ignore[assignment]
        assert refuses(model), "it may have to be compiled"
        model.compiled = "none"  # type: ignore[assignment]
        cache: Any = model.make_cache(3, 46)
        cache.hold([2, 1, 2])
        assert Played(model, cache).prefill(padded(ROWS[0]), [3, 7, 1]) is None
        assert cache.held() == [2, 1, 2]


@gpu
def test_generations_of_many_widths() -> None:
    model = on_gpu("llama")
    for _ in range(3):
        for rows in ROWS:
            options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": ()}
            want = generate(model, padded(rows), capture=False, **options)
            assert torch.equal(generate(model, padded(rows), capture=True, **options), want)
