"""Hugging Face's config.json, as transformers 4 and 5 write it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fms.modules.positions import RopeScaling
from fms.utils.serialization.config_map import REQUIRED, ConfigMap, Field, Values
from fms.utils.serialization.errors import CheckpointError, nearest

ACTIVATIONS = {  # theirs, ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
HF_DECODER: list[Field] = [
    ("vocab_size", "src_vocab_size", REQUIRED),
    ("hidden_size", "emb_dim", REQUIRED),
    ("intermediate_size", "hidden_dim", REQUIRED),
    ("num_hidden_layers", "nlayers", REQUIRED),
    ("num_attention_heads", "nheads", REQUIRED),
    ("num_key_value_heads", "kvheads", lambda v: v["num_attention_heads"]),
    ("head_dim", "head_dim", lambda v: v["hidden_size"] // v["num_attention_heads"]),
    ("rms_norm_eps", "norm_eps", 1e-6),
    ("max_position_embeddings", "max_expected_seq_len", 2048),
    ("attention_bias", "attn_bias", False),
    ("mlp_bias", "mlp_bias", False),
    ("attention_dropout", "p_dropout", 0.0),
    ("tie_word_embeddings", "tie_heads", False),
    ("pad_token_id", "pad_id", None),
]
HF_FIXED: dict[str, tuple[Any, ...]] = {
    "auto_map": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
}
HF_HARMLESS = frozenset(
    (  # noqa: SIM905  (a list of names reads better as words)
        "_name_or_path _attn_implementation* _commit_hash architectures model_type torch_dtype dtype "
        "transformers_version transformers.js_config unsloth* pretraining_tp initializer_range "
        "bos_token_id eos_token_id sep_token_id decoder_start_token_id tokenizer_class prefix "
        "use_cache output_attentions output_hidden_states return_dict return_dict_in_generate output_scores "
        "torchscript use_bfloat16 is_decoder is_llama_config cross_attention_hidden_size tf_legacy_loss "
        "task_specific_params problem_type id2label label2id num_labels finetuning_task "
        "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
        "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values "
        "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
    ).split()
)
ROPE_KEYS = {  # theirs, ours, for each kind of rotary scaling
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {n: n for n in ("factor", "low_freq_factor", "high_freq_factor")}
    | {"original_max_position_embeddings": "original_max_len"},
    "yarn": {
        n: n for n in ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    }
    | {"original_max_position_embeddings": "original_max_len"},
}


def read_hf_rope(left: Values, ours: Values) -> Values:
    """Rotary fields in the form of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""
    given = dict(left.pop("rope_scaling", None) or {}) | dict(left.pop("rope_parameters", None) or {})
    theta = left.pop("rope_theta", None)
    theta = given.pop("rope_theta", None) or theta or 10_000.0
    new, old = given.pop("rope_type", None), given.pop("type", None)
    if (partial := given.pop("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise CheckpointError(f"partial_rotary_factor={partial} is not supported here, only 1.0")
    outer = left.pop("original_max_position_embeddings", None)
    kind = new or old or (None if given else "default")
    scaling = None
    if kind != "default":
        if kind not in ROPE_KEYS:
            raise CheckpointError(
                f"rotary scaling {kind!r} is not known{nearest(str(kind), ROPE_KEYS)}; known are {', '.join(ROPE_KEYS)}"
            )
        values = {}
        for theirs, value in given.items():
            if theirs in ROPE_KEYS[kind]:
                if value is not None:
                    values[ROPE_KEYS[kind][theirs]] = value
            elif theirs not in ("finetuned", "original_max_position_embeddings"):
                raise CheckpointError(
                    f"field {theirs!r} of rotary scaling {kind!r} is not known{nearest(theirs, ROPE_KEYS[kind])}"
                )
        if "factor" not in values:
            raise CheckpointError(f"rotary scaling {kind!r} has no 'factor'")
        if outer is not None and kind in ("llama3", "yarn"):
            values["original_max_len"] = outer
        values.setdefault("original_max_len", ours["max_expected_seq_len"])
        scaling = RopeScaling(kind, **values)
    elif given.keys() - {"factor", "original_max_position_embeddings"}:
        raise CheckpointError(f"rotary fields {sorted(given)} are given, but the rope_type is {kind!r}")
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def write_hf_rope(config: Any) -> Values:
    """Both forms at once: transformers 4 reads the first two fields, transformers 5 the last."""
    s: RopeScaling | None = config.rope_scaling
    if s is None:
        rope: Values = {"rope_type": "default"}
        old = None
    else:
        if s.kind in ("linear", "dynamic") and s.original_max_len != config.max_expected_seq_len:
            config = replace(config, max_expected_seq_len=s.original_max_len)
        rope = {"rope_type": s.kind}
        rope |= {t: v for t, o in ROPE_KEYS[s.kind].items() if (v := getattr(s, o)) is not None}
        old = dict(rope)
    return {
        "max_position_embeddings": config.max_expected_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": old,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }


def hf_map(
    model_type: str,
    hf_class: str,
    fields: Sequence[Field] = (),
    *,
    base: Sequence[Field] = HF_DECODER,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    rope: bool = True,
    fixed: Mapping[str, Sequence[Any]] = HF_FIXED,
    harmless: Iterable[str] = (),
) -> ConfigMap:
    """The map of a causal family in Hugging Face's `config.json`: the common fields (`base`) and some of its own.

    `activation` is their name of that field and what holds without it; `rope` says whether there are rotary fields.
    """

    def read_more(left: Values, ours: Values) -> Values:
        key, default = activation
        name = left.pop(key, default)
        if name not in ACTIVATIONS:
            raise CheckpointError(
                f"{key}={name!r} is not known{nearest(name, ACTIVATIONS)}; known are {', '.join(ACTIVATIONS)}"
            )
        pad = ours["pad_id"]
        pad = pad if pad is not None and 0 <= pad < ours["src_vocab_size"] else None
        return {"activation_fn": ACTIVATIONS[name], "pad_id": pad} | (read_hf_rope(left, ours) if rope else {})

    def write_more(config: Any) -> Values:
        theirs = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation_fn]
        return {activation[0]: theirs} | (write_hf_rope(config) if rope else {})

    constants = {"architectures": [hf_class], "model_type": model_type}
    known = HF_HARMLESS | frozenset(harmless)
    return ConfigMap((model_type,), [*base, *fields], fixed, known, constants, read_more, write_more)
