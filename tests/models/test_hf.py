"""Causal models as Hugging Face models against transformers' own, with the same weights."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn

from fms.models import freeze, get_model
from fms.models.convert import convert

transformers = pytest.importorskip("transformers")

from fms.models.hf import FMSForCausalLM, FMSModel, as_fms_model, register_fms_models, to_hf_api  # noqa: E402
from tests.models.test_against_transformers import close, pair, some_ids  # noqa: E402
from tests.small import small_granite, small_model  # noqa: E402
from tests.tiny import write_tiny_chat  # noqa: E402

CASES = ["gqa", "both biases, tied", "granite, tied", "mistral, window", "mixtral", "qwen3", "gpt_bigcode"]
CASES += ["dynamic, short", "dynamic, beyond", "granite 4, dense, no rotary"]
LEFT = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_p": 0.9},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "assisted": {},
}


def twins(case: str, path: Path, frozen: bool = False) -> tuple[Any, Any]:
    """transformers' model and our adapter of the same weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = pair(case, frozen, path)
    theirs.generation_config.eos_token_id = theirs.generation_config.bos_token_id = None
    return theirs, to_hf_api(ours, eos_token_id=None)


def small_hf(**overrides: Any) -> FMSForCausalLM:
    return to_hf_api(small_model(), **overrides)


def checkpointing(hf: Any, word: str = "enable") -> None:
    """By the name that this release of transformers has for it."""
    (getattr(hf, f"activation_checkpointing_{word}", None) or getattr(hf, f"gradient_checkpointing_{word}"))()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_with_padding_on_either_side(case: str, tmp_path: Path) -> None:
    theirs, hf = twins(case, tmp_path)
    ids = some_ids(2, 12)
    for mask in (None, LEFT, LEFT.flip(1), torch.ones_like(LEFT)):
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        want = theirs(ids, attention_mask=mask, position_ids=positions).logits
        there = torch.ones_like(ids).bool() if mask is None else mask.bool()
        close(hf(ids, attention_mask=mask).logits[there], want[there])
        close(hf(ids, attention_mask=mask, position_ids=positions).logits[there], want[there])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES)
def test_generate(case: str, how: str, tmp_path: Path) -> None:
    theirs, hf = twins(case, tmp_path)
    ids = some_ids(1 if how == "assisted" else 2, 12)
    options = {"max_new_tokens": 20, "pad_token_id": 0} | HOW[how]
    if how == "assisted" and theirs._is_stateful:
        pytest.skip("transformers assists no model of a kind that may hold states")
    if how == "assisted":
        helper = twins(case, tmp_path / "helper")
        with torch.no_grad():
            for model in helper:
                model.get_input_embeddings().weight += 0.02  # of another mind now and then
        found = [m.generate(ids, assistant_model=h, **options) for m, h in zip((theirs, hf), helper, strict=True)]
        assert torch.equal(found[1], hf.generate(ids, **options))
    else:
        found = []
        for model in (theirs, hf):
            torch.manual_seed(3)
            found.append(model.generate(ids, attention_mask=LEFT, **options))
    assert found[1].shape[1] == 32
    assert torch.equal(*found)


@torch.no_grad()
def test_a_frozen_model_generates_the_same(tmp_path: Path) -> None:
    theirs, hf = twins("gqa", tmp_path, frozen=True)
    ids = some_ids(2, 12)
    found = [m.generate(ids, attention_mask=LEFT, max_new_tokens=20, pad_token_id=0) for m in (theirs, hf)]
    assert torch.equal(*found)


@torch.no_grad()
def test_generate_from_embeddings() -> None:
    hf = small_hf(eos_token_id=None)
    ids = torch.randint(24, (2, 6))
    want = hf.generate(ids, max_new_tokens=8)[:, 6:]
    assert torch.equal(hf.generate(inputs_embeds=hf.get_input_embeddings()(ids), max_new_tokens=8), want)


CHANGES: dict[str, tuple[Callable[[Any], Any], list[list[int]]]] = {  # of a cache, and the tokens that it then holds
    "crop": (lambda cache: cache.crop(-4), [[1, 2], [7, 8]]),
    "crop all": (lambda cache: cache.crop(-6), [[], []]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [[7, 8, 9, 10, 11, 12]]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [[*range(1, 7)]] * 2 + [[*range(7, 13)]] * 2),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [[*range(7, 13)], [*range(1, 7)]]),
    "copy": (copy.deepcopy, [[*range(1, 7)], [*range(7, 13)]]),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_cache_that_was_changed_goes_on(change: str) -> None:
    hf = small_hf()
    act, held = CHANGES[change]
    cache = transformers.DynamicCache(config=hf.config)
    hf(torch.arange(1, 13).view(2, 6), past_key_values=cache)
    cache = act(cache) or cache
    more = torch.randint(24, (len(held), 3))
    whole = torch.cat((torch.tensor(held).long(), more), 1)
    for first, end in ((0, 1), (1, 3)):  # one token, then two
        assert cache.get_seq_length() == len(held[0]) + first
        got = hf(more[:, first:end], past_key_values=cache).logits
        close(got, hf(whole[:, : len(held[0]) + end], use_cache=False).logits[:, first - end :])


def test_a_cache_may_be_reset() -> None:
    hf, ids = small_hf(), torch.randint(24, (2, 6))
    cache = transformers.DynamicCache(config=hf.config)
    with torch.no_grad():
        want = hf(ids, past_key_values=cache).logits
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("this release of transformers keeps the length")
        close(hf(ids, past_key_values=cache).logits, want)
        assert cache.get_seq_length() == 6


def test_a_cache_serves_with_gradients_and_without() -> None:
    hf = small_hf()
    cache, ids = transformers.DynamicCache(config=hf.config), torch.randint(24, (2, 6))
    want = hf(ids).logits
    for i, mode in enumerate((torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode)):
        with mode():
            close(hf(ids[:, i : i + 1], past_key_values=cache).logits, want[:, i : i + 1])


@pytest.mark.parametrize("case", ["gqa", "granite, tied", "mistral, window"])
def test_outputs_and_gradients(case: str, tmp_path: Path) -> None:
    theirs, hf = twins(case, tmp_path)
    ids = some_ids(2, 12)
    labels = ids.masked_fill((torch.rand(ids.shape) < 0.3) | (LEFT.cumsum(1) < 2), -100)  # none from a padding
    want, got = (m(ids, labels=labels, attention_mask=LEFT, output_hidden_states=True) for m in (theirs, hf))
    close(got.loss, want.loss)
    assert len(got.hidden_states) == len(want.hidden_states)
    for ours, reference in zip(got.hidden_states, want.hidden_states, strict=True):
        close(ours[LEFT.bool()], reference[LEFT.bool()])
    embeds = theirs.get_input_embeddings()(ids)
    close(hf(inputs_embeds=embeds).logits, theirs(ids).logits)
    for keep in (1, 3, torch.tensor([2, 5])):
        close(hf(ids, logits_to_keep=keep).logits, theirs(ids, logits_to_keep=keep).logits)
    assert isinstance(hf(ids, return_dict=False), tuple)

    (plain,) = torch.autograd.grad(hf(ids, labels=ids).loss, [hf.get_input_embeddings().weight])
    hf.train()
    checkpointing(hf)
    out = hf(ids, labels=ids)
    assert out.past_key_values is None
    (again,) = torch.autograd.grad(out.loss, [hf.get_input_embeddings().weight])
    close(again, plain)
    checkpointing(hf, "disable")
    assert not hf.gradient_checkpointing


def test_checkpointing_recomputes_every_block() -> None:
    hf = small_hf().train()
    checkpointing(hf)
    calls = []
    for block in hf.decoder.layers:
        block.ln.register_forward_hook(lambda *_: calls.append(1))
    hf(some_ids(1, 5) % 24, labels=some_ids(1, 5) % 24).loss.backward()
    assert len(calls) == 2 * len(hf.decoder.layers)


def test_shared_weights_and_classes() -> None:
    model = small_model()
    before = model.embedding.weight.clone()
    hf = to_hf_api(model)
    assert type(hf) is FMSForCausalLM
    assert hf.decoder is model
    assert torch.equal(model.embedding.weight, before)
    assert hf.config.vocab_size == 24
    assert hf.config.num_key_value_heads == 2
    register_fms_models()
    register_fms_models()


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_saved_and_loaded(tied: bool, tmp_path: Path) -> None:
    hf = to_hf_api(small_granite(tie_heads=tied), eos_token_id=7, max_new_tokens=5)
    ids = torch.randint(24, (1, 6))
    want = hf(ids).logits
    hf.decoder = torch.compile(hf.decoder, backend="eager")
    hf.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not [name for name in names if "_orig_mod" in name]
    assert ("decoder.head.weight" in names) != tied
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fms"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is FMSForCausalLM
    assert again.generation_config.eos_token_id == 7
    assert again.generation_config.max_new_tokens == 5
    assert torch.equal(again(ids).logits, want)
    assert (again.decoder.head.weight is again.decoder.embedding.weight) == tied
    bare = transformers.AutoModel.from_pretrained(tmp_path, output_hidden_states=True)
    assert type(bare) is FMSModel
    close(again.decoder.head(bare(ids).last_hidden_state), want)
    assert len(bare(ids).hidden_states) == len(bare.decoder.layers) + 1


@torch.no_grad()
def test_a_compiled_decoder() -> None:
    hf = small_hf()
    ids = torch.randint(24, (2, 6))
    want = hf.generate(ids, max_new_tokens=8)
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(graph)
        return graph.forward

    names = list(hf.state_dict())
    compiled = torch.compile(hf.decoder, backend=backend)
    hf.decoder = compiled
    assert hf.decoder is compiled
    assert torch.equal(hf.generate(ids, max_new_tokens=8), want)
    assert calls
    assert list(hf.state_dict()) == names
    assert list(dict(hf.named_parameters())) == [n for n in names if n in dict(hf.named_parameters())]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_steps_with_a_static_cache_compile_as_one_graph(frozen: bool) -> None:
    from torch._dynamo.utils import counters

    hf = to_hf_api(freeze(small_model()) if frozen else small_model(), eos_token_id=None)
    options = {"attention_mask": LEFT, "max_new_tokens": 8, "cache_implementation": "static"}
    want = hf.generate(some_ids(2, 12) % 24, **options)
    how = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True  # generate compiles by itself, but only on a GPU
    counters.clear()
    assert torch.equal(hf.generate(want[:, :12], compile_config=how, **options), want)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [19, 32])
@torch.no_grad()
def test_another_vocabulary(size: int, tied: bool, tmp_path: Path) -> None:
    hf = to_hf_api(small_granite(tie_heads=tied))
    ids = torch.randint(19, (1, 6))
    before = hf(ids).logits
    hf.resize_token_embeddings(size)
    after = hf(ids).logits
    assert after.shape[-1] == size == hf.config.vocab_size == hf.decoder.config.src_vocab_size
    close(after[..., :19], before[..., :19])
    assert (hf.decoder.head.weight is hf.decoder.embedding.weight) == tied
    hf.save_pretrained(tmp_path)
    close(FMSForCausalLM.from_pretrained(tmp_path)(ids).logits, after)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nheads": 3}, ["nheads=3", "of the model itself"]),
        ({"eos_tokens": 3}, ["eos_tokens", "eos_token_id", "is not known"]),
    ],
)
def test_overrides_that_are_not(change: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        small_hf(**change)
    assert all(word in str(error.value) for word in words)


def test_inputs_and_caches_that_do_not_fit() -> None:
    hf = small_hf()
    ids = torch.randint(24, (2, 6))

    def refused(words: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=words):
            hf(**arguments)

    refused("49 positions are more than the 48", input_ids=torch.zeros(1, 49, dtype=torch.long))
    refused("neither of input_ids and inputs_embeds", input_ids=None)
    refused("token id 30 lies beyond the vocabulary of 24", input_ids=torch.tensor([[30]]))
    refused("token id 30 lies beyond the vocabulary of 24", input_ids=torch.tensor([[3, 30]]))
    refused("output_attentions", input_ids=ids, output_attentions=True)
    refused("tuple, a transformers Cache", input_ids=ids, past_key_values=())
    static = transformers.StaticCache(config=hf.config, max_cache_len=5)
    refused(
        "0 tokens in the cache and 6 new ones are more than its max_cache_len=5", input_ids=ids, past_key_values=static
    )
    used = hf(ids, use_cache=True).past_key_values
    refused("the cache holds 2 rows, the input has 1", input_ids=ids[:1], past_key_values=used)
    deeper = to_hf_api(small_model(nlayers=3))
    refused("the cache has 3 layers, the model 2", input_ids=ids, past_key_values=deeper(ids).past_key_values)
    long = hf(torch.randint(24, (1, 46))).past_key_values
    for mask in (None, torch.ones(1, 49)):
        refused("49 positions are more than the 48", input_ids=ids[:1, :3], past_key_values=long, attention_mask=mask)
    with pytest.raises(ValueError, match="no adapter for a Odd"):
        to_hf_api(type("Odd", (nn.Linear,), {"config": small_model().config})(2, 2))


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write_tiny_chat(tmp_path / "chat")


def test_pipeline_and_streamer(chat: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chat)
    hf = to_hf_api(get_model(model_path=chat))
    tokenizer.pad_token = tokenizer.eos_token
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for prompt in ("The quick", ["The quick", "What is the capital"], messages):
        found = [
            transformers.pipeline("text-generation", model=m, tokenizer=tokenizer)(
                prompt, max_new_tokens=9, do_sample=False, batch_size=2
            )
            for m in (theirs, hf)
        ]
        assert found[0] == found[1]
        assert found[0]

    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = tokenizer("The quick", return_tensors="pt")
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    thread = Thread(target=hf.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    want = hf.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(want)
    assert len(pieces) > 1


def test_as_fms_model(chat: Path) -> None:
    ids = torch.randint(200, (1, 6))
    model = as_fms_model(chat)
    close(model(ids), get_model(model_path=chat)(ids))
    close(get_model("hf_pretrained", model_path=chat)(ids), model(ids))
    empty = as_fms_model(chat, initialize_model_with_weights=False)
    assert empty.config == model.config
    assert not torch.equal(empty.embedding.weight, model.embedding.weight)
    (chat / "model.safetensors").unlink()
    wider = get_model("hf_configured", str(chat), nlayers=3)
    assert len(wider.layers) == 3
    for arguments in ({}, {"variant": "a/b", "model_path": chat}, {"variant": "a/b", "source": "hf"}):
        with pytest.raises(ValueError, match="hf_pretrained"):
            get_model("hf_pretrained", **arguments)
    with pytest.raises(ValueError, match="hf_configured"):
        get_model("hf_configured")


@pytest.mark.slow
def test_smollm2_says_what_it_says_in_transformers(smollm2: Path, tmp_path: Path) -> None:
    convert(smollm2, tmp_path / "hf", "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", padding_side="left")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    hf = to_hf_api(freeze(get_model(model_path=smollm2)))
    inputs = tokenizer(["The capital of France is", "Once upon a time, in a village by the sea,"], padding=True)
    inputs = inputs.convert_to_tensors("pt")
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.7}):
        found = []
        for model in (theirs, hf):
            torch.manual_seed(1)
            found.append(model.generate(**inputs, max_new_tokens=8, pad_token_id=2, **options))
        assert torch.equal(*found), options
    assert "Paris" in tokenizer.decode(found[0][0])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@torch.no_grad()
def test_steps_on_a_gpu(compiled: bool) -> None:
    """Logits in bf16 against those of fp32: with either cache no farther than without one."""
    exact, hf = small_model().cuda().bfloat16().float(), to_hf_api(freeze(small_model().cuda().bfloat16()))
    ids = torch.randint(24, (2, 15), device="cuda")
    want = exact(ids)
    noise = (hf(ids, use_cache=False).logits - want).norm() / want.norm()
    if compiled:
        hf.decoder = torch.compile(hf.decoder)
    caches = transformers.DynamicCache(config=hf.config), transformers.StaticCache(config=hf.config, max_cache_len=20)
    for cache in caches:
        steps = [hf(x, past_key_values=cache).logits for x in ids.split([9, *[1] * 6], 1)]
        assert (torch.cat(steps, 1) - want).norm() / want.norm() < 2 * noise + 1e-2
    kept = hf.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert kept.shape == (2, 35)
