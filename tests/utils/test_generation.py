"""generate(): transformers' greedy tokens, every row as if it were alone, what ends a row, streams, hooks, errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fms.models import Decoder, freeze
from fms.models.convert import save_model
from fms.utils import generation
from fms.utils.generation import Run, generate, stream
from fms.utils.tensors import GrowingCache
from fms.utils.tokenizers import get_tokenizer
from tests.small import small_model

CHARS = get_tokenizer("char_tokenizer")
DYNAMIC = {"kind": "dynamic", "factor": 4.0, "original_max_len": 8}


@pytest.fixture(scope="module", params=["", "frozen", "dynamic"])
def model(request: pytest.FixtureRequest) -> Decoder:
    model = small_model(rope_scaling=DYNAMIC if request.param == "dynamic" else None)
    return freeze(model) if request.param == "frozen" else model


PLAIN = small_model()
TEXT = small_model(src_vocab_size=256, emb_dim=24)
PROMPTS = [[1, 5, 9, 2, 4, 4, 11, 3, 19, 18, 2, 2, 8, 15, 1, 1, 10, 16, 5, 4], [20, 3], [8], [6, 6, 6, 1, 17]]
SAMPLED = {"temperature": 3.0, "seed": 11}


def rows_of(result: list[Tensor]) -> list[list[int]]:
    return [row.tolist() for row in result]


@pytest.mark.parametrize("ends", [0, 1, 3])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_greedy_is_transformers(ends: int, frozen: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours, ids = small_model(), torch.randint(24, (6, 5))
    theirs = AutoModelForCausalLM.from_pretrained(save_model(ours, tmp_path / "hf", "hf"))
    if frozen:
        freeze(ours)
    whole = generate(ours, ids, max_new_tokens=20)
    eos = {0: None, 1: int(whole[0, 9]), 3: whole[:3, 12].tolist()}[ends]
    theirs.generation_config.eos_token_id = eos
    theirs.generation_config.pad_token_id = 0
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    got = generate(ours, ids, max_new_tokens=20, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(got, want)
    assert torch.equal(got, whole) == (eos is None)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("chunk", [2048, 3])
@pytest.mark.parametrize(
    "how",
    [{}, SAMPLED, {"temperature": 2.0, "top_k": 9, "top_p": 0.9}, {"repetition_penalty": 1.4}],
    ids=["greedy", "sampled", "filtered", "penalty"],
)
def test_a_row_is_the_same_alone(
    model: Decoder, use_cache: bool, chunk: int, how: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    ends = {"max_new_tokens": 24, "eos_token_id": [0, 7, 12, 21]}
    together = rows_of(generate(model, PROMPTS, use_cache=use_cache, **ends, **how))
    for i, prompt in enumerate(PROMPTS):
        seed = {"seed": how.get("seed", 0) + i} if "temperature" in how else {}
        (alone,) = generate(model, [prompt], **ends, **(how | seed))
        assert together[i] == alone.tolist()
        assert together[i][: len(prompt)] == prompt
        assert not {0, 7, 12, 21} & set(together[i][len(prompt) : -1])
    if "temperature" in how:
        assert len({len(row) - len(prompt) for row, prompt in zip(together, PROMPTS, strict=True)}) > 1


def test_forms_go_in_and_come_out() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    two = generate(PLAIN, ids, max_new_tokens=4)
    assert two.shape == (2, 7)
    assert torch.equal(generate(PLAIN, ids[0], max_new_tokens=4), two[0])
    assert rows_of(generate(PLAIN, [[1, 2, 3], [4, 5, 6]], max_new_tokens=4)) == two.tolist()
    assert rows_of(generate(PLAIN, tuple(ids), max_new_tokens=4)) == two.tolist()
    assert generate(PLAIN, ids.int(), max_new_tokens=4).tolist() == two.tolist()
    texts = generate(TEXT, ["ab", "c"], max_new_tokens=4, tokenizer=CHARS)
    prompt = CHARS.encode("ab", add_special_tokens=True)
    assert texts[0] == CHARS.decode(generate(TEXT, torch.tensor(prompt), max_new_tokens=4)[len(prompt) :])
    assert generate(TEXT, "ab", max_new_tokens=4, tokenizer=CHARS) == texts[0]


def test_lengths() -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert generate(PLAIN, ids, max_seq_len=9).shape == (1, 9)
    assert generate(PLAIN, ids).shape == (1, 48)  # the context of the model
    assert generate(PLAIN, ids, max_new_tokens=5, max_seq_len=40).shape == (1, 8)
    assert generate(PLAIN, ids, max_new_tokens=40, max_seq_len=6).shape == (1, 6)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_each_row_has_room_of_its_own(model: Decoder, use_cache: bool) -> None:
    """A row near the limit ends there, and cuts no other."""
    prompts = [[1] * 44, [2, 3], [4] * 47, [5] * 40]
    options = {"max_seq_len": 48, "max_new_tokens": 10, "use_cache": use_cache, "repetition_penalty": 1.5}
    together = rows_of(generate(model, prompts, **options))
    assert [len(row) for row in together] == [48, 12, 48, 48]
    for prompt, row in zip(prompts, together, strict=True):
        assert rows_of(generate(model, [prompt], **options)) == [row]


def test_defaults_come_from_the_checkpoints_generation_config() -> None:
    model, ids = small_model(), torch.tensor([[1, 2, 3]])
    greedy = generate(model, ids, max_new_tokens=12)
    sampled = generate(model, ids, max_new_tokens=12, do_sample=True, temperature=3.0, top_k=20)
    assert not torch.equal(greedy, sampled)
    model.generation_defaults = {"do_sample": True, "temperature": 3.0, "top_k": 20, "max_new_tokens": 12}
    assert torch.equal(generate(model, ids), sampled)
    assert torch.equal(generate(model, ids, do_sample=False), greedy)
    assert torch.equal(generate(model, ids, temperature=0.0), greedy)
    end = int(greedy[0, 6])
    model.generation_defaults = {"eos_token_id": [end, 99], "pad_token_id": 23}
    assert torch.equal(generate(model, ids)[0], greedy[0, : greedy[0].tolist().index(end, 3) + 1])
    both = generate(model, torch.cat((ids, ids + 3)), max_new_tokens=12)
    assert set(both[0, 3 + greedy[0, 3:].tolist().index(end) + 1 :].tolist()) <= {23}
    assert generate(model, ids, eos_token_id=[], max_new_tokens=12).tolist() == greedy.tolist()


def test_a_tokenizers_eos_ends_a_row() -> None:
    model = small_model(src_vocab_size=256)
    with torch.no_grad():
        model.head.weight[3] = 5 * model.dec_norm.weight.sign()  # CHARS' eos
    ids = [torch.tensor([70, 71])]
    assert len(generate(model, ids, max_new_tokens=9, tokenizer=CHARS)[0]) < 11
    assert len(generate(model, ids, max_new_tokens=9)[0]) == 11


def text_of(prompt: str, **options: Any) -> str:
    return generate(TEXT, prompt, max_new_tokens=30, tokenizer=CHARS, eos_token_id=[], temperature=1.5, **options)


def test_stop_strings() -> None:
    whole = text_of("Hello")
    assert len(whole) > 20
    for at, size in ((3, 1), (5, 3), (9, 4)):
        stop = whole[at : at + size]
        end = whole.index(stop)
        assert text_of("Hello", stop=stop) == whole[:end]
        assert text_of("Hello", stop=["\0\0\0", stop, whole[25:29]]) == whole[:end]
    texts = generate(
        TEXT, ["Hello", "x"], max_new_tokens=30, tokenizer=CHARS, eos_token_id=[], temperature=1.5, stop=whole[5:8]
    )
    assert texts[0] == whole[: whole.index(whole[5:8])]


@pytest.mark.parametrize("stop", [(), (12, 14), (4, 9)], ids=str)
def test_streamed_pieces_are_the_text(stop: tuple[int, ...]) -> None:
    options = {"max_new_tokens": 30, "eos_token_id": [], "temperature": 1.5}
    whole = generate(TEXT, "Hello", tokenizer=CHARS, **options)
    stops = [whole[slice(*stop)]] if stop else []
    pieces = list(stream(TEXT, "Hello", CHARS, stop=stops, **options))
    assert "".join(pieces) == (whole[: whole.index(stops[0])] if stop else whole)
    assert all(pieces)
    assert len(pieces) > 3
    assert "".join(stream(TEXT, CHARS.encode("Hello", add_special_tokens=True), CHARS, **options)) == whole


@pytest.mark.parametrize("kind", ["static", "growing"])
def test_a_cache_is_continued(kind: str) -> None:
    ids, more = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[7, 8]])
    cache = PLAIN.make_cache(1, 40) if kind == "static" else GrowingCache(2)
    first = generate(PLAIN, ids, max_new_tokens=5, cache=cache)
    assert cache.held() == [8]  # the last token was never fed
    new = torch.cat((first[:, 8:], more), 1)
    second = generate(PLAIN, new, max_new_tokens=6, cache=cache, temperature=2.0)
    whole = generate(PLAIN, torch.cat((first, more), 1), max_new_tokens=6, temperature=2.0)
    assert torch.equal(second[:, 3:], whole[:, 11:])
    assert cache.held() == [16]


def test_a_cache_of_rows_that_ended_at_different_steps_is_continued() -> None:
    ends = {"max_new_tokens": 12, "eos_token_id": [0, 7, 12, 21]}
    cache = PLAIN.make_cache(4, 48)
    first = rows_of(generate(PLAIN, PROMPTS, cache=cache, **SAMPLED, **ends))
    assert cache.held() == [len(row) - 1 for row in first]
    assert len({len(row) - len(prompt) for row, prompt in zip(first, PROMPTS, strict=True)}) > 1
    new = [[row[-1], i + 2] for i, row in enumerate(first)]
    second = rows_of(generate(PLAIN, new, cache=cache, **ends))
    whole = rows_of(generate(PLAIN, [[*row, i + 2] for i, row in enumerate(first)], **ends))
    assert [a + b[2:] for a, b in zip([[*r, i + 2] for i, r in enumerate(first)], second, strict=True)] == whole


def test_rows_that_ended_early_give_their_room_back() -> None:
    cache, calls = PLAIN.make_cache(2, 20), []

    def end_the_longer_row(length: int, logits: Tensor, tokens: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        calls.append(length)
        return torch.tensor([[23], [1]]), kwargs

    prompts = [[1, 2, 3, 4, 5, 6], [1]]
    options = {"cache": cache, "eos_token_id": 23, "max_new_tokens": 9}
    generate(PLAIN, prompts, post_iteration_hook=end_the_longer_row, **options)
    assert cache.held() == [6, 9]
    second = rows_of(generate(PLAIN, [[2] * 9, [3] * 9], **options))
    assert [len(row) for row in second] == [11, 11]
    (alone,) = rows_of(generate(PLAIN, [[*prompts[0], *[2] * 9]], max_new_tokens=2))
    assert alone[-2:] == second[0][-2:]


def test_hooks() -> None:
    ids, calls = torch.tensor([[1, 2, 3], [4, 5, 6]]), []

    def before(step: int, given: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        calls.append(("before", step, tuple(given.shape)))
        return given, kwargs

    def after(length: int, logits: Tensor, tokens: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        calls.append(("after", length, tuple(logits.shape), tuple(tokens.shape)))
        assert torch.equal(logits.argmax(-1, keepdim=True), tokens)
        return torch.full_like(tokens, length), kwargs

    hooks: dict[str, Callable] = {"prepare_model_inputs_hook": before, "post_iteration_hook": after}
    for use_cache in (True, False):
        calls.clear()
        result = generate(PLAIN, ids, max_new_tokens=3, use_cache=use_cache, **hooks)
        assert result[:, 3:].tolist() == [[3, 4, 5]] * 2
        widths = [3, 1, 1] if use_cache else [3, 4, 5]
        assert [c for c in calls if c[0] == "before"] == [("before", i, (2, w)) for i, w in enumerate(widths)]
        assert [c for c in calls if c[0] == "after"] == [("after", 3 + i, (2, 24), (2, 1)) for i in range(3)]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["unequal", "equal"])
def test_what_a_hook_returns_goes_into_the_model(prompts: list, use_cache: bool) -> None:
    """Embeddings in place of ids, and shifted positions, from the first step on."""
    model, embedded = small_model(), []

    def embed(step: int, given: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        embedded.append(step)
        return model.embedding(given), kwargs

    options = {"max_new_tokens": 4, "use_cache": use_cache}
    want = rows_of(generate(model, prompts, **options))
    assert rows_of(generate(model, prompts, prepare_model_inputs_hook=embed, **options)) == want
    assert embedded == [0, 1, 2, 3]


def test_only_the_last_positions_reach_the_head() -> None:
    shapes = []
    handle = PLAIN.head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:-1].numel()))
    try:
        for prompts in (PROMPTS, [PROMPTS[0]] * 4):
            for use_cache in (True, False):
                generate(PLAIN, prompts, max_new_tokens=3, use_cache=use_cache)
    finally:
        handle.remove()
    assert shapes == [4] * 12


def test_timing() -> None:
    ids = torch.tensor([[1, 2, 3]])
    result, times = generate(PLAIN, ids, max_new_tokens=5, timing="per-token")
    assert result.shape == (1, 8)
    assert len(times) == 5
    assert all(t > 0 for t in times)
    _, (total,) = generate(PLAIN, ids, max_new_tokens=5, timing="e2e")
    assert total > 0
    run = Run(PLAIN, [ids[0]], max_new_tokens=5)
    list(run)
    timing = run.timing
    assert timing.total == timing.first_token + sum(timing.steps)
    assert timing.tokens_per_second == 4 / sum(timing.steps)
    assert timing.prompt_tokens == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_are_an_error(bad: float, how: dict) -> None:
    model = freeze(small_model())
    with torch.no_grad():
        model.embedding.weight[9, 3] = bad
    assert len(generate(model, [[1, 2]], max_new_tokens=1, **how)[0]) == 3
    with pytest.raises(ValueError, match="row 1: logits are not finite at new token 1: look at the weights"):
        generate(model, [[1, 2], [1, 9]], max_new_tokens=3, **how)


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "prompt 0 is empty"),
        (torch.zeros(0, 3, dtype=torch.long), {}, "there is no prompt"),
        ([[1, 24]], {}, "prompt 0 has token id 24; the vocabulary is 0 to 23"),
        ([[1], [-1]], {}, "prompt 1 has token id -1"),
        ([[1.5, 2.0]], {}, "prompt 0 must be token ids in one dimension"),
        ([1, 2, 3], {}, "prompt 0 must be token ids in one dimension"),
        (torch.zeros(1, 1, 2), {}, r"input_ids of shape \[1, 1, 2\] must have one or two dimensions"),
        (torch.ones(1, 48, dtype=torch.long), {}, "the prompt has 48 tokens and leaves no room for a new one"),
        (IDS, {"max_seq_len": 3}, "the limit is 3"),
        (IDS, {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (IDS, {"temprature": 1.0}, r"generate\(\) has no argument 'temprature' \(did you mean 'temperature'\?\)"),
        (IDS, {"eos": 1}, r"generate\(\) has no argument 'eos'"),
        (IDS, {"num_beams": 2}, r"generate\(\) has no argument 'num_beams'"),
        (IDS, {"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        (IDS, {"timing": "pertoken"}, "timing='pertoken' must be 'per-token', 'e2e' or empty"),
        (IDS, {"stop": "x"}, "stop strings need a tokenizer"),
        (IDS, {"stop": "", "tokenizer": CHARS}, "stop strings must not be empty"),
        ("Hello", {}, "texts need a tokenizer"),
        (IDS, {"cache": PLAIN.make_cache(2, 9)}, "the cache has 2 rows, the prompts are 1"),
        (IDS, {"cache": PLAIN.make_cache(1, 3)}, "the prompt has 3 tokens .* the limit is 3"),
        (IDS, {"cache": PLAIN.make_cache(1, 9), "use_cache": False}, "use_cache=False contradicts the cache"),
    ],
)
def test_errors_come_before_any_work(given: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(PLAIN, given, **options)
