"""LLaMA and Granite against transformers: tiny random models, saved by its `save_pretrained`, loaded by ours.

Weights have a standard deviation of 0.15 and a hidden state 32 channels, so that logits are of scale 1 with peaks of 4:
an error of 1e-5 is then rounding, and a missing rotary embedding, multiplier or bias shows in the first digit.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fms.models import Decoder, freeze, get_model
from fms.utils.serialization.checkpoint import open_checkpoint

transformers = pytest.importorskip("transformers")

LENGTH, STD = 24, 0.15
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.8,
}


def rope(kind: str, factor: float, **fields: object) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, "factor": factor, **fields}}


def yarn(**fields: object) -> dict:
    return rope("yarn", 4.0, original_max_position_embeddings=16, **fields)


GQA = {"num_key_value_heads": 2}
GRANITE = GQA | MULTIPLIERS
GRANITE4 = GRANITE | {"layer_types": ["attention"] * 2, "mamba_n_heads": 4, "shared_intermediate_size": 24}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3}
BIGCODE = {
    "n_embd": 32,
    "n_inner": 40,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
}
CASES: dict[str, tuple[str, dict]] = {
    "mha": ("Llama", {}),
    "gqa": ("Llama", GQA),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "attention_bias": ("Llama", GQA | {"attention_bias": True}),
    "mlp_bias": ("Llama", {"mlp_bias": True}),
    "both biases, tied": ("Llama", GQA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "larger head_dim": ("Llama", GQA | {"head_dim": 12}),
    "smaller head_dim": ("Llama", {"head_dim": 4}),
    "larger eps": ("Llama", {"rms_norm_eps": 0.1}),
    "pad_token_id": ("Llama", {"pad_token_id": 3}),
    "rope_theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}),
    "linear": ("Llama", rope("linear", 2.5)),
    "dynamic, short": ("Llama", rope("dynamic", 4.0)),
    "dynamic, beyond": ("Llama", rope("dynamic", 4.0) | {"max_position_embeddings": 16}),
    "llama3": (
        "Llama",
        rope("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40),
    ),
    "yarn": ("Llama", yarn()),
    "yarn, betas": ("Llama", yarn(beta_fast=4.0, beta_slow=0.5)),
    "yarn, attention_factor": ("Llama", yarn(attention_factor=1.5)),
    "yarn, mscale": ("Llama", yarn(mscale=0.7, mscale_all_dim=0.3)),
    "yarn, one mscale": ("Llama", yarn(mscale=0.7)),
    "yarn, fractions": ("Llama", yarn(beta_fast=0.7, beta_slow=0.15, truncate=False)),
    "yarn, long": ("Llama", rope("yarn", 4.0, original_max_position_embeddings=4000)),
    "yarn, equal betas": ("Llama", yarn(beta_fast=0.5, beta_slow=0.5, truncate=False)),
    "gelu": ("Llama", {"hidden_act": "gelu"}),
    "gelu_new": ("Llama", {"hidden_act": "gelu_new"}),
    "gelu_pytorch_tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": ("Llama", {"hidden_act": "relu"}),
    "granite": ("Granite", GRANITE),
    "granite, tied": ("Granite", GRANITE | {"tie_word_embeddings": True}),
    "granite, biases": ("Granite", GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "granite, no multipliers": ("Granite", GQA),
    "granite, yarn": ("Granite", GRANITE | yarn()),
    "mistral": ("Mistral", GQA | {"sliding_window": None}),
    "mistral, window": ("Mistral", GQA | {"sliding_window": 7}),
    "mistral, wide window": ("Mistral", GQA | {"sliding_window": 30}),
    "qwen3": ("Qwen3", GQA | {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3, untied": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "mixtral": ("Mixtral", GQA | {"num_local_experts": 4}),
    "mixtral, window": ("Mixtral", GQA | EXPERTS | {"sliding_window": 7, "tie_word_embeddings": True}),
    "mixtral, one expert": ("Mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1, "hidden_act": "gelu"}),
    "granite 4, dense": (
        "GraniteMoeHybrid",
        GRANITE4 | {"num_local_experts": 0, "position_embedding_type": "rope", "attention_bias": True},
    ),
    "granite 4, dense, no rotary": ("GraniteMoeHybrid", GRANITE4 | {"num_local_experts": 0}),
    "granite 4, experts": ("GraniteMoeHybrid", GRANITE4 | EXPERTS | {"position_embedding_type": "rope"}),
    "granite 4, experts, no rotary": (
        "GraniteMoeHybrid",
        GRANITE4 | EXPERTS | {"position_embedding_type": "nope", "tie_word_embeddings": True},
    ),
    "gpt_bigcode": ("GPTBigCode", BIGCODE),
    "gpt_bigcode, mha": ("GPTBigCode", BIGCODE | {"multi_query": False}),
    "gpt_bigcode, untied": ("GPTBigCode", BIGCODE | {"tie_word_embeddings": False, "activation_function": "gelu"}),
}
TWO = ("both biases, tied", "granite")
frozen_or_not = pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])


def reference(case: str, path: Path) -> torch.nn.Module:
    """transformers' model of a case, random, also saved at `path`."""
    family, fields = CASES[case]
    names = ("vocab_size", "attn_implementation") if family == "GPTBigCode" else COMMON
    config = getattr(transformers, f"{family}Config")(**({name: COMMON[name] for name in names} | fields))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if re.search(r"(norm|ln_.)\.weight", name) else 0.0, STD)
    model.save_pretrained(path)
    return model


def pair(case: str, frozen: bool, path: Path) -> tuple[torch.nn.Module, Decoder]:
    theirs = reference(case, path)
    ours = get_model(model_path=path).eval()
    return theirs, freeze(ours) if frozen else ours


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def some_ids(*shape: int) -> Tensor:
    return torch.randint(COMMON["vocab_size"], shape)


@frozen_or_not
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(case: str, frozen: bool, tmp_path: Path) -> None:
    theirs, ours = pair(case, frozen, tmp_path)
    ids = some_ids(2, LENGTH)
    want = theirs(ids).logits
    assert 0.5 < want.std() < 5
    close(ours(ids), want)
    for sizes in ([9, 8, 7], [LENGTH - 5, 1, 1, 3], [1] * LENGTH):
        cache = ours.make_cache(2, LENGTH)
        close(torch.cat([ours(chunk, cache=cache) for chunk in ids.split(sizes, 1)], 1), want)


@frozen_or_not
@pytest.mark.parametrize("case", TWO)
@torch.no_grad()
def test_rows_padded_on_the_right(case: str, frozen: bool, tmp_path: Path) -> None:
    theirs, ours = pair(case, frozen, tmp_path)
    ids, lengths = some_ids(3, 10), (4, 10, 7)
    tail = some_ids(3, 3)
    rows = [torch.cat((row[:n], more)) for row, more, n in zip(ids, tail, lengths, strict=True)]
    want = [theirs(row[None]).logits[0] for row in rows]

    cache = ours.make_cache(3, 13)
    logits = ours(ids, cache=cache)
    cache.rewind(lengths)
    after = torch.cat([ours(chunk, cache=cache) for chunk in tail.split([2, 1], 1)], 1)
    for i, n in enumerate(lengths):
        close(torch.cat((logits[i, :n], after[i])), want[i])


@frozen_or_not
@pytest.mark.parametrize("case", TWO)
@torch.no_grad()
def test_rows_padded_on_the_left_by_mask_and_position_ids(case: str, frozen: bool, tmp_path: Path) -> None:
    theirs, ours = pair(case, frozen, tmp_path)
    ids, pads = some_ids(2, 12), torch.tensor([0, 5])
    there = torch.arange(12) >= pads[:, None]  # b kv
    positions = (there.cumsum(1) - 1).clamp(min=0)
    mask = there[:, None] & torch.ones(12, 12, dtype=torch.bool).tril()  # b s kv
    mask |= torch.eye(12, dtype=torch.bool)  # a padding looks at itself
    want = theirs(ids, attention_mask=there.long(), position_ids=positions).logits[there]
    close(ours(ids, position_ids=positions, mask=mask)[there], want)

    cache = ours.make_cache(2, 12)
    got = [
        ours(ids[:, i:j], position_ids=positions[:, i:j], mask=mask[:, i:j, :j], cache=cache)
        for i, j in ((0, 8), (8, 11), (11, 12))
    ]
    close(torch.cat(got, 1)[there], want)


@frozen_or_not
@pytest.mark.parametrize("shape", [(9, 9), (3, 9, 9), (3, 1, 9, 9), (3, 4, 9, 9)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@torch.no_grad()
def test_masks(shape: tuple[int, ...], kind: str, frozen: bool, tmp_path: Path) -> None:
    theirs, ours = pair("gqa", frozen, tmp_path)
    ids = some_ids(3, 9)
    allowed = (torch.rand(shape) < 0.6) | torch.eye(9, dtype=torch.bool)  # not causal
    added = torch.zeros(shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    full = added[:, None] if added.dim() == 3 else added
    want = theirs(ids, attention_mask=full.expand(3, full.shape[1] if full.dim() == 4 else 1, 9, 9)).logits
    mask = allowed if kind == "bool" else added
    close(ours(ids, mask=mask), want)

    past = torch.ones(9, 9, dtype=torch.bool).tril()
    mask = allowed & past if kind == "bool" else added.masked_fill(~past, -torch.inf)
    cache = ours.make_cache(3, 9)
    got = [ours(ids[:, i:j], mask=mask[..., i:j, :j], cache=cache) for i, j in ((0, 6), (6, 8), (8, 9))]
    close(torch.cat(got, 1), ours(ids, mask=mask))


@frozen_or_not
@pytest.mark.parametrize("case", TWO)
@torch.no_grad()
def test_positions_embeddings_and_last_tokens(case: str, frozen: bool, tmp_path: Path) -> None:
    theirs, ours = pair(case, frozen, tmp_path)
    ids = some_ids(2, 7)
    want = theirs(ids).logits
    one, each = torch.tensor([[0, 3, 4, 9, 10, 30, 31]]), torch.randint(60, (2, 7))
    close(ours(ids, position_ids=one), theirs(ids, position_ids=one).logits)
    close(ours(ids, position_ids=each), theirs(ids, position_ids=each).logits)
    close(ours(theirs.get_input_embeddings()(ids)), want)
    close(ours.head(ours.hidden(ids)), want)
    close(ours.head.local(ours.hidden(ids)), want)
    for n in (1, 3, 7, 20):
        close(ours(ids, last_n_tokens=n), want[:, -n:])


@pytest.mark.parametrize("case", ["gqa", "both biases, tied", "llama3", "granite, tied", "pad_token_id"])
def test_gradients(case: str, tmp_path: Path) -> None:
    theirs, ours = pair(case, False, tmp_path)
    ids = some_ids(2, 12)
    for model, logits in ((theirs, theirs(ids).logits), (ours, ours(ids))):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert all(p.grad is not None for p in model.parameters())
    want = dict(theirs.named_parameters())
    parts, _ = open_checkpoint(tmp_path).parts(ours.config)
    for name, parameter in ours.named_parameters():
        gradient = want[parts[name].key].grad
        error = (parameter.grad - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, f"{name}: {error}"


@frozen_or_not
@pytest.mark.parametrize("case", ["gqa", "both biases, tied", "llama3", "granite"])
@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_is(case: str, frozen: bool, tmp_path: Path) -> None:
    theirs = reference(case, tmp_path / "fp32").bfloat16()
    theirs.save_pretrained(tmp_path / "bf16")
    ours = get_model(model_path=tmp_path / "bf16").eval()
    assert ours.embedding.weight.dtype == torch.bfloat16
    if frozen:
        freeze(ours)
    exact = get_model(model_path=tmp_path / "bf16", data_type="fp32")
    ids = some_ids(8, LENGTH)
    want = exact(ids)
    errors = [(logits.float() - want).pow(2).mean().sqrt() for logits in (ours(ids), theirs(ids).logits)]
    assert errors[0] < 1.5 * errors[1]
    assert errors[1] < 0.1 * want.std()
