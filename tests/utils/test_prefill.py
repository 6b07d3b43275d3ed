"""Prompts that go in as one graph leave what they leave when each kernel is launched by itself, or alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fms.kernels import attend as attention
from fms.models import Decoder, freeze
from fms.utils import capture as capturing
from fms.utils import generation
from fms.utils.capture import CapturedStep, keep, kept
from fms.utils.generation import Run, generate
from fms.utils.sampling import Sampling
from tests.small import small_model
from tests.utils.test_capture import MODELS, OnCpu, Played, gpu, on_gpu

ROWS = (
    [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]],
    [[8] * 32, [9, 7] * 10, [2]],
    [[2] * 33] * 3,
    [[7, 9] * 14] * 3,
    [[6] * 32] * 3,
)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "COME_OFTEN", 2)
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
    for rows in (*ROWS[:2], ROWS[1], ROWS[3], ROWS[0], ROWS[4], ROWS[3]):
        check(model, step, rows, device, near)
        with torch.inference_mode():  # the next prompts are of another generation
            step.begin(torch.tensor([1, 2, 3], device=device), [n + 4 for n in step.cache.held()])
            step.replay()
    assert list(step.prompts) == [(32, False), (32, True)]
    assert all(prompts.graph is not None for prompts in step.prompts.values())
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
        for graph in (step.prompts[32, False].graph, None):
            step.prompts[32, False].graph = graph
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

    def _prefill(self, prompts: capturing.Prompts) -> Tensor:
        self.planned.append(attention._planned.get())
        return super()._prefill(prompts)


def test_a_width_is_captured_once_it_has_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "COME_OFTEN", 4)
    model = freeze(small_model())
    step = Watched(model, model.make_cache(3, 46))
    for rows, graphs in ((ROWS[0], 0), (ROWS[1], 0), (ROWS[2], 0), (ROWS[0], 0), (ROWS[1], 1), (ROWS[0], 1)):
        check(model, step, rows, "cpu", 2e-5)
        assert sum(prompts.graph is not None for prompts in step.prompts.values()) == graphs
    assert {width: prompts.times for width, prompts in step.prompts.items()} == {(32, False): 5, (46, True): 1}
    assert step.planned == [False] * 4 + [True, False]  # then what was captured, played


def test_padding_has_room() -> None:
    model = freeze(small_model("gpt_bigcode"))
    for length, slack, rows, width in ((31, 0, ROWS[0], 31), (48, 0, ROWS[2], 48), (48, 20, ROWS[2], 48)):
        step = Played(model, model.make_cache(3, length, slack))
        for _ in range(2):
            check(model, step, rows, "cpu", 2e-5)
        assert [of_width for of_width, _ in step.prompts] == [width]


def test_other_weights_take_other_graphs() -> None:
    model = freeze(small_model())
    step = prompts_come_again(model, Played, "cpu", 2e-5)
    step.begin(torch.tensor([1, 2, 3]), [40] * 3)
    step.replay()
    keep(step)
    model.embedding.weight.data = model.embedding.weight.data * 2
    again = kept(model, 3, 46, Sampling(), ())
    assert again is step
    assert step.prompts[32, False].graph is None
    check(model, step, ROWS[0], "cpu", 2e-5)
    assert step.prompts[32, False].graph is not None


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


def test_the_graph_unused_for_longest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "WIDTH", 4)
    monkeypatch.setattr(capturing, "GRAPHS", 2)
    model = freeze(small_model())
    step = Played(model, model.make_cache(3, 46))
    for n in (3, 3, 7, 7, 2, 11, 11, 5, 4):
        check(model, step, [[2] * n] * 3, "cpu", 2e-5)
    assert {width for (width, _), prompts in step.prompts.items() if prompts.graph} == {4, 12}
    for n in (6, 12, 8):
        check(model, step, [[2] * n] * 3, "cpu", 2e-5)
    assert {width for (width, _), prompts in step.prompts.items() if prompts.graph} == {4, 8}


class Short(Played):
    """Without memory for a graph."""

    def _graph(self, run: Any) -> Any:
        super()._graph(run).replay()
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_without_memory_for_a_graph_kernels_are_launched() -> None:
    model = freeze(small_model())
    step = Short(model, model.make_cache(3, 46))
    for _ in range(5):
        check(model, step, ROWS[0], "cpu", 2e-5)
    assert [(prompts.graph, prompts.times) for prompts in step.prompts.values()] == [(None, 1)]


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations play the captured step on a CPU."""
    monkeypatch.setattr(generation, "CapturedStep", Played)
    monkeypatch.setattr(generation, "torch", OnCpu())
    monkeypatch.setattr(Run, "_obstacle", lambda self: "")


def rows_of(run: Run) -> list[list[int | None]]:
    return [list(row) for row in zip(*run, strict=True)]


@pytest.mark.usefixtures("plays")
def test_rows_of_a_larger_batch_draw_as_there() -> None:
    model = freeze(small_model())
    options: dict[str, Any] = {"max_new_tokens": 18, "temperature": 3.0, "seed": 5, "eos_token_id": ()}
    prompts = [torch.tensor([3, 1, 4, 1]), torch.tensor([5, 9]), torch.tensor([2, 6, 5]), torch.tensor([3, 5])]
    want = rows_of(Run(model, prompts, capture=False, **options))
    for capture in (False, True):
        for first in (0, 2):
            for _ in range(3):
                run = Run(model, prompts[first : first + 2], capture=capture, first_row=first, **options)
                assert rows_of(run) == want[first : first + 2]


@pytest.mark.usefixtures("plays")
def test_what_ends_at_its_first_token_leaves_what_was_kept() -> None:
    model, ids = freeze(small_model()), torch.tensor([[3, 1, 4]])
    first = int(generate(model, ids, max_new_tokens=1, capture=False)[0, 3])
    options: dict[str, Any] = {"max_new_tokens": 18, "eos_token_id": [first], "capture": True}
    generate(model, ids, **options)
    assert model not in capturing._kept, "there is no graph to be kept"
    generate(model, torch.tensor([[7, 7, 7]]), **options)
    kept_one = capturing._kept[model]
    for _ in range(3):
        assert generate(model, ids, **options).tolist() == [[3, 1, 4, first]]
        assert capturing._kept[model] is kept_one
    assert kept_one.prompts[21, True].graph is not None


@pytest.mark.usefixtures("plays")
def test_a_cache_that_was_given_holds_no_padding() -> None:
    model = freeze(small_model())
    cache = model.make_cache(1, 48)
    run = Run(model, [torch.tensor([3, 1, 4])], cache=cache, max_new_tokens=18, capture=True)
    steps = iter(run)
    next(steps)
    assert cache.held() == [3]
    assert not run.step.prompts


@pytest.mark.usefixtures("plays")
def test_prompts_of_several_chunks_go_in_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = freeze(small_model())
    for chunk, widths in ((7, 0), (8, 1)):
        monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
        generate(model, [[3] * 8], max_new_tokens=18, eos_token_id=(), capture=True)
        assert len(capturing._kept[model].prompts) == widths


@pytest.mark.usefixtures("plays")
def test_a_step_without_a_graph_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = freeze(small_model())
    options: dict[str, Any] = {"max_new_tokens": 18, "eos_token_id": (), "capture": True}
    want = generate(model, [[3] * 8], **options)
    kept_one = capturing._kept[model]
    model.load_state_dict(model.state_dict())
    monkeypatch.setattr(kept_one, "_graph", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, [[3] * 8], **options)
    assert model not in capturing._kept
    assert [row.tolist() for row in generate(model, [[3] * 8], **options)] == [row.tolist() for row in want]


def test_what_looks_on_in_a_block_is_an_obstacle() -> None:
    model = freeze(small_model())
    run = Run(model, [torch.tensor([3, 1])], max_new_tokens=18)
    run.device = torch.device("cuda")
    assert run._obstacle() == ""
    handle = model.layers[1].register_forward_hook(lambda *given: None)
    assert run._obstacle() == "with hooks"
    handle.remove()
    assert run._obstacle() == ""


@gpu
def test_generations_of_many_widths() -> None:
    model = on_gpu("llama")
    for _ in range(3):
        for rows in ROWS:
            options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": ()}
            want = [row.tolist() for row in generate(model, rows, capture=False, **options)]
            assert [row.tolist() for row in generate(model, rows, capture=True, **options)] == want


@gpu
@pytest.mark.parametrize("name", ["llama", "dynamic"])
def test_loaded_again_between_generations(name: str) -> None:
    """Graphs of weights that have moved are made anew, the step's first or the prompt's."""
    model = on_gpu(name)
    for rows in (ROWS[0], ROWS[0], ROWS[1], ROWS[1], ROWS[3]):
        options: dict[str, Any] = {"max_new_tokens": 13, "eos_token_id": ()}
        want = [row.tolist() for row in generate(model, rows, capture=False, **options)]
        for _ in range(2):
            assert [row.tolist() for row in generate(model, rows, capture=True, **options)] == want
        model.load_state_dict({key: value * 1.01 for key, value in model.state_dict().items()})
