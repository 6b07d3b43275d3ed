"""The captured decode step gives what plain steps give: tokens, what ends a row, caches, streams, errors."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fms.models import Decoder, freeze, get_model
from fms.utils import capture as capturing
from fms.utils import generation
from fms.utils.capture import CapturedStep, forget, keep, kept
from fms.utils.generation import Run, generate, stream
from fms.utils.sampling import Sampling
from fms.utils.tokenizers import get_tokenizer
from tests.small import SHAPE, small_granite, small_model

CHARS = get_tokenizer("char_tokenizer")
PROMPTS = [[1, 5, 9, 2, 4, 4, 11, 3, 19, 18, 2, 2, 8, 15, 1, 1, 10, 16, 5, 4], [20, 3], [8], [6, 6, 6, 1, 17]]
MODELS: dict[str, Any] = {
    "llama": small_model,
    "granite": lambda: small_granite(attn_bias=True, mlp_bias=True),
    "gpt_bigcode": lambda: bigcode(),
    "qwen3": lambda: small_model("qwen3", "0.6b"),
    "mixtral": lambda: small_model("mixtral", "8x7b", num_experts=4, top_k_experts=2),
    "mistral, window": lambda: small_model("mistral", "7b", sliding_window=9),
    "dynamic": lambda: small_model(rope_scaling={"kind": "dynamic", "factor": 4.0, "original_max_len": 8}),
}
HOW: dict[str, Any] = {
    "greedy": {},
    "sampled": {"temperature": 3.0, "seed": 11},
    "filtered": {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.7},
    "penalised, sampled": {"repetition_penalty": 1.7, "temperature": 2.0, "seed": 4},
}
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "COME_OFTEN", 2)


def bigcode() -> Decoder:
    sizes = {name: value for name, value in SHAPE.items() if name != "rope_theta"} | {"kvheads": 1}
    model = get_model("gpt_bigcode", "micro", **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    return model.eval()


def on_gpu(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    return freeze(MODELS[name]().to("cuda", dtype))


def unpadded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding may change tokens, prompts of their own width, for the same kernels as plain launches have."""
    if dtype != torch.float32:
        monkeypatch.setattr(capturing, "WIDTH", 1)


def rows_of(result: Any) -> list[list[int]]:
    return [row.tolist() for row in result]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_same_tokens(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    unpadded(dtype, monkeypatch)
    model = on_gpu(name, dtype)
    for how in HOW.values():
        for ends in ({}, {"eos_token_id": [0, 7, 12, 21]}):
            options = {"max_new_tokens": 24, **how, **ends}
            plain = rows_of(generate(model, PROMPTS, capture=False, **options))
            assert rows_of(generate(model, PROMPTS, capture=True, **options)) == plain
            alone = rows_of(generate(model, PROMPTS[:1], capture=False, **options))
            assert rows_of(generate(model, PROMPTS[:1], capture=True, **options)) == alone


@gpu
def test_kernels_and_plain_operations_agree() -> None:
    """Logits of decode steps in bf16 against those of fp32: no farther than where no kernel of ours took part."""
    ids, new = torch.randint(24, (3, 9), device="cuda"), torch.randint(24, (3, 6), device="cuda")
    for name in MODELS:
        exact, model = MODELS[name]().to("cuda").bfloat16().float(), on_gpu(name, torch.bfloat16)
        with torch.no_grad():
            want = exact(torch.cat((ids, new), 1))[:, 9:]
            one_pass = model(torch.cat((ids, new), 1))[:, 9:].float()
            cache = model.make_cache(3, 15)
            model(ids, cache=cache)
            steps = torch.cat([model(token[:, None], cache=cache) for token in new.T], 1).float()
        noise = (one_pass - want).norm() / want.norm()
        assert (steps - want).norm() / want.norm() < 2 * noise + 1e-2, name


@gpu
def test_rows_have_room_of_their_own() -> None:
    model = on_gpu("llama")
    prompts = [[1] * 24, [2, 3], [4] * 47, [5] * 40]
    options = {"max_seq_len": 48, "max_new_tokens": 20}
    plain = rows_of(generate(model, prompts, capture=False, **options))
    assert rows_of(generate(model, prompts, capture=True, **options)) == plain
    assert [len(row) for row in plain] == [44, 22, 48, 48]


@gpu
def test_a_cache_is_continued() -> None:
    model = on_gpu("llama")
    ends = {"max_new_tokens": 18, "eos_token_id": [0, 7, 12, 21], **HOW["sampled"]}
    results = []
    for capture in (False, True):
        cache = model.make_cache(4, 48)
        first = rows_of(generate(model, PROMPTS, cache=cache, capture=capture, **ends))
        held = cache.held()
        assert held == [len(row) - 1 for row in first]
        new = [[row[-1], i + 2] for i, row in enumerate(first)]
        results.append((first, held, rows_of(generate(model, new, cache=cache, capture=capture, **ends))))
    assert results[0] == results[1]


@gpu
def test_stop_strings_and_streams() -> None:
    model = freeze(small_model(src_vocab_size=256, emb_dim=24).to("cuda"))
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": [], "temperature": 1.5}
    whole = generate(model, "Hello", tokenizer=CHARS, capture=False, **options)
    assert generate(model, "Hello", tokenizer=CHARS, capture=True, **options) == whole
    for stop in (whole[3:5], whole[12:14], whole[20]):
        text = whole[: whole.index(stop)]
        assert generate(model, "Hello", tokenizer=CHARS, stop=stop, capture=True, **options) == text
        cache = model.make_cache(1, 48)
        assert "".join(stream(model, "Hello", CHARS, stop=stop, capture=True, cache=cache, **options)) == text
        again = model.make_cache(1, 48)
        assert "".join(stream(model, "Hello", CHARS, stop=stop, capture=False, cache=again, **options)) == text
        assert cache.held() == again.held()


@gpu
def test_logits_that_are_not_finite_are_an_error() -> None:
    model = on_gpu("llama")
    tokens = generate(model, PROMPTS[:1], max_new_tokens=20, capture=False)[0].tolist()
    with torch.no_grad():
        model.embedding.weight[tokens[len(PROMPTS[0]) + 3], 3] = float("nan")
    for capture in (False, True):
        with pytest.raises(ValueError, match="row 0: logits are not finite at new token"):
            generate(model, PROMPTS[:1], max_new_tokens=20, capture=capture)


@gpu
def test_a_compiled_model_is_captured() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = on_gpu("llama", dtype)
        plain = rows_of(generate(model, PROMPTS, max_new_tokens=20, capture=False))
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert rows_of(generate(compiled, PROMPTS, max_new_tokens=20, capture=False)) == plain
        assert rows_of(generate(compiled, PROMPTS, max_new_tokens=20, capture=True)) == plain


@gpu
def test_a_graph_serves_again() -> None:
    model = on_gpu("llama")
    cache = model.make_cache(2, 48)
    step = CapturedStep(model, cache)
    want = generate(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), max_new_tokens=6, capture=False).cuda()
    graphs = []
    for _ in range(2):
        cache.hold([0, 0])
        first = model(want[:, :3], cache=cache, last_n_tokens=1)[:, -1].argmax(-1)
        step.begin(first, [9, 9])
        graphs.append(step.graph)
        got = [first.clone()]
        for _ in range(5):
            step.replay()
            got.append(step.tokens.clone())
        assert torch.equal(torch.stack(got, 1), want[:, 3:])
        step.finish([8, 8])
        assert cache.held() == [8, 8]
    assert graphs[0] is graphs[1]


def test_a_ring_that_goes_on_is_not_run_ahead() -> None:
    model = freeze(small_model("mistral", "7b", sliding_window=9))
    obstacles = []
    for cache in (None, model.make_cache(1, 40)):
        run = Run(model, [torch.tensor([1, 2])], max_new_tokens=20, cache=cache)
        run.device = torch.device("cuda")
        obstacles.append(run._obstacle())
    assert obstacles[0] == ""
    assert obstacles[1].startswith("with a RollingCache that goes on")


def test_where_it_cannot_be_done() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="can't be captured on cpu: it takes a CUDA device"):
        generate(model, [[1, 2]], max_new_tokens=2, capture=True)
    assert not Run(model, [torch.tensor([1, 2])]).capture
    frozen = freeze(small_model())
    frozen.compiled = "reduce-overhead"
    run = Run(frozen, [torch.tensor([1, 2])])
    run.device = torch.device("cuda")
    assert run._obstacle() == "of a model compiled with 'reduce-overhead', which makes graphs of its own"


@gpu
def test_what_stands_in_the_way_is_named() -> None:
    model = small_model().to("cuda")
    obstacles: dict[str, dict[str, Any]] = {
        "not frozen": {},
        "no cache": {"use_cache": False},
        "hooks": {"post_iteration_hook": lambda n, logits, tokens, kwargs: (tokens, kwargs)},
    }
    for word, options in obstacles.items():
        with pytest.raises(ValueError, match=word):
            generate(model, [[1, 2]], max_new_tokens=20, capture=True, **options)
        generate(model, [[1, 2]], max_new_tokens=20, **options)
        freeze(model)


class Played(CapturedStep):
    """Without a graph, on a CPU. What is replayed changes nothing of the host's."""

    def _graph(self, run: Callable[[], None]) -> Any:
        def replay() -> None:
            cache = self.cache
            before = cache.length, cache.lengths
            run()
            cache.length, cache.lengths = before

        return SimpleNamespace(replay=replay)


def played(model: Decoder, step: CapturedStep, ids: torch.Tensor, new: int) -> list[list[int]]:
    tokens = []
    with torch.inference_mode():
        step.cache.span = torch.full((len(ids), 1), ids.shape[1] + new)
        model.hidden(ids[:, :-1], cache=step.cache)
        step.begin(ids[:, -1], [ids.shape[1] + new] * len(ids))
        for _ in range(new):
            step.replay()
            tokens.append(step.tokens.clone())
        step.finish([ids.shape[1] + new - 1] * len(ids))
    return torch.stack(tokens, 1).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt_bigcode", "dynamic"])
def test_a_step_serves_the_next_generation(name: str) -> None:
    model = freeze(MODELS[name]())
    step: CapturedStep | None = Played(model, model.make_cache(2, 20))
    for width, new in ((9, 11), (4, 9), (12, 3)):
        ids = torch.randint(24, (2, width))
        want = generate(model, ids, max_new_tokens=new, eos_token_id=())[:, width:].tolist()
        assert step is not None
        assert played(model, step, ids, new) == want
        keep(step)
        assert step.model is None
        again = kept(model, 2, 20, Sampling(), ())
        assert again is step
        assert again.cache.held() == [0, 0]
        step = again


def test_what_a_step_does_not_serve() -> None:
    model = freeze(small_model())

    def made(eos: Any = (3, 5)) -> CapturedStep:
        step = Played(model, model.make_cache(2, 20), Sampling(do_sample=True, seed=1), eos)
        played(model, step, torch.randint(24, (2, 4)), 2)
        return step

    def found(rows: int = 2, length: int = 20, how: Sampling | None = None, eos: Any = (5, 3)) -> bool:
        return kept(model, rows, length, how or Sampling(do_sample=True, seed=1), eos) is not None

    for asked, serves in (
        ({}, True),
        ({"length": 7}, True),
        ({"rows": 1}, False),
        ({"length": 21}, False),
        ({"how": Sampling()}, False),
        ({"eos": (3,)}, False),
    ):
        keep(made())
        assert found(**asked) == serves  # type: ignore[arg-type]
        assert not found()  # taken, or forgotten
    keep(made())
    forget(model)
    assert not found()
    step = made()
    keep(step)
    model.embedding.weight.data = model.embedding.weight.data.clone()
    assert kept(model, 2, 20, Sampling(do_sample=True, seed=1), (3, 5)) is step
    assert step.graph is None, "it reads weights that are gone"
    keep(made())
    with torch.autocast("cpu", torch.bfloat16):
        assert not found()
    step = made()
    keep(step)
    step.stream = "another"
    assert not found()
    step = made()
    model.compiled = "blocks"  # type: ignore[assignment]
    keep(step)
    assert not found()


def test_a_model_that_has_changed_takes_another_kind_of_step() -> None:
    model = freeze(small_model())

    def kind() -> Any:
        step = Played(model, model.make_cache(2, 20))
        played(model, step, torch.randint(24, (2, 4)), 2)
        return step._kind()

    seen = {kind()}
    assert kind() in seen
    model.compiled = "blocks"  # type: ignore[assignment]
    seen.add(kind())
    model.head.weight = torch.nn.Parameter(model.head.weight[:20].clone(), requires_grad=False)
    seen.add(kind())
    assert len(seen) == 3


def test_what_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = freeze(small_model())
    step = Played(model, model.make_cache(2, 20))
    played(model, step, torch.randint(24, (2, 4)), 2)
    monkeypatch.setattr(capturing, "KEPT", sum(t.nbytes for layer in step.cache.layers for t in (layer.k, layer.v)) - 1)
    keep(step)
    assert kept(model, 2, 20, Sampling(), ()) is None
    monkeypatch.setattr(capturing, "KEPT", capturing.KEPT + 1)
    step.lasts = False
    keep(step)
    assert kept(model, 2, 20, Sampling(), ()) is None
    step.lasts = True
    keep(step)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "a step keeps its model alive"


def one_after_the_other(model: Decoder) -> None:
    for how in HOW.values():
        for prompts in (PROMPTS, [[7, 3] * 10] * 4):
            want = rows_of(generate(model, prompts, max_new_tokens=20, capture=False, **how))
            assert rows_of(generate(model, prompts, max_new_tokens=20, capture=True, **how)) == want
        again = capturing._kept[model]
        assert rows_of(generate(model, prompts, max_new_tokens=20, capture=True, **how)) == want
        assert capturing._kept[model] is again
    graphs = []
    for prompts in (PROMPTS, PROMPTS[1:2] + PROMPTS[1:], [[7] * 20] * 4, [[1, 2, 3]] * 4):
        for ends in ((), (7, 12)):
            want = rows_of(generate(model, prompts, max_new_tokens=20, capture=False, eos_token_id=ends))
            assert rows_of(generate(model, prompts, max_new_tokens=20, capture=True, eos_token_id=ends)) == want
            if not ends:
                graphs.append(capturing._kept[model].graph)
            assert rows_of(generate(model, prompts, max_new_tokens=20, capture=True, eos_token_id=ends)) == want
            assert any(prompts.graph for prompts in capturing._kept[model].prompts.values())
    assert graphs[0] is not graphs[1]  # of other ends in between
    for prompts in (PROMPTS, [[1, 2, 3]] * 4):
        generate(model, prompts, max_new_tokens=20, capture=True, eos_token_id=())
        graphs.append(capturing._kept[model].graph)
    assert graphs[-1] is graphs[-2]
    cache = model.make_cache(4, 40)
    generate(model, PROMPTS, max_new_tokens=20, capture=True, eos_token_id=(), cache=cache)
    assert capturing._kept[model].graph is graphs[-1], "a cache that was given is not kept"
    model.layers[0].ln.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(model, PROMPTS, max_new_tokens=20, capture=True, eos_token_id=())
    assert model not in capturing._kept


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generations_one_after_the_other(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    unpadded(dtype, monkeypatch)
    one_after_the_other(on_gpu("llama", dtype))


class OnCpu:
    """`torch`, but for what takes a GPU."""

    cuda = SimpleNamespace(Event=lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *sizes: int, pin_memory: bool, **how: Any) -> torch.Tensor:
        return torch.empty(*sizes, **how)


def test_generations_one_after_the_other_played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "CapturedStep", Played)
    monkeypatch.setattr(generation, "torch", OnCpu())
    monkeypatch.setattr(Run, "_obstacle", lambda self: "")
    one_after_the_other(freeze(small_model()))
    model = freeze(small_model())

    class Failing(Played):
        def replay(self) -> None:
            super().replay()
            self.rows.tokens.fill_(-1)

    monkeypatch.setattr(generation, "CapturedStep", Failing)
    with pytest.raises(ValueError, match="not finite at new token 2") as raised:
        generate(model, PROMPTS, max_new_tokens=20, capture=True)
    del raised
    gc.collect()
    assert model not in capturing._kept
