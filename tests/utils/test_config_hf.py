"""Reading config.json: both forms, real ones, and everything that is not understood is an error that names it."""

import json
from typing import Any

import pytest

from fms.models import get_model, granite, llama
from fms.modules.positions import RopeScaling
from fms.utils.config import DecoderConfig
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.sources import get_source

SMALL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def read(values: dict[str, Any], architecture: str = "llama") -> dict[str, Any]:
    config = get_source(architecture, "hf").config
    assert config is not None
    return config.read(values, "config.json")


def config_of(values: dict[str, Any]) -> DecoderConfig:
    family = {"llama": llama.LLaMAConfig, "granite": granite.GraniteConfig}[values["model_type"]]
    return family.from_dict(read(values, values["model_type"]))


@pytest.mark.parametrize(
    ("four", "five", "theta", "scaling"),
    [
        ({}, {}, 1e4, None),
        ({"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 1e4, None),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            1e4,
            RopeScaling("linear", factor=2.0, original_max_len=128),
        ),
        (
            {"rope_theta": 2e4, "rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 2e4}},
            2e4,
            RopeScaling("dynamic", factor=4.0, original_max_len=128),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 6.0,
                    "original_max_position_embeddings": 32,
                },
            },
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 6.0,
                    "original_max_position_embeddings": 32,
                },
            },
            5e5,
            RopeScaling("llama3", 8.0, 32, low_freq_factor=2.0, high_freq_factor=6.0),
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "finetuned": True,
                }
            },
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": None}}
            | {"original_max_position_embeddings": 32},
            1e4,
            RopeScaling("yarn", 4.0, 32),
        ),
    ],
    ids=["absent", "none", "theta", "linear", "dynamic", "llama3", "yarn"],
)
def test_both_forms_give_the_same(four: dict, five: dict, theta: float, scaling: RopeScaling | None) -> None:
    configs = [
        config_of(SMALL | four | {"torch_dtype": "bfloat16", "transformers_version": "4.40.0"}),
        config_of(SMALL | five | {"dtype": "bfloat16", "transformers_version": "5.1.0"}),
    ]
    assert configs[0] == configs[1]
    assert (configs[0].rope_theta, configs[0].rope_scaling) == (theta, scaling)


def test_what_is_absent_or_null_has_transformers_defaults() -> None:
    nulls = dict.fromkeys(("num_key_value_heads", "head_dim", "pad_token_id", "attention_dropout"))
    want = llama.LLaMAConfig(
        src_vocab_size=64,
        emb_dim=32,
        hidden_dim=48,
        nlayers=2,
        nheads=4,
        kvheads=4,
        head_dim=8,
        norm_eps=1e-6,
        max_expected_seq_len=128,
    )
    assert config_of(SMALL) == config_of(SMALL | nulls) == want
    assert config_of(SMALL | {"pad_token_id": -1}).pad_id is None  # of the first conversions: no padding token


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 4096}, "field 'sliding_window' (= 4096) is not known"),
        ({"layer_types": ["full_attention"]}, "field 'layer_types'"),
        ({"use_qk_norm": True}, "field 'use_qk_norm'"),
        (
            {"num_kv_heads": 2},
            "field 'num_kv_heads' (= 2) is not known for llama (did you mean 'num_key_value_heads'?)",
        ),
        ({"embedding_multiplier": 12.0}, "field 'embedding_multiplier'"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map={'AutoModel': 'modeling_x.X'} is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method': 'gptq'}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"hidden_act": "silo"}, "hidden_act='silo' is not known (did you mean 'silu'?)"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": None, "hiden_size": 8}, "has no 'hidden_size' (did you mean 'hiden_size'?)"),
        ({"rope_scaling": {"factor": 8.0}}, "rotary scaling None is not known"),
        ({"rope_scaling": {"type": "linaer", "factor": 8.0}}, "'linaer' is not known (did you mean 'linear'?)"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rotary scaling 'longrope' is not known"),
        ({"rope_scaling": {"type": "linear"}}, "rotary scaling 'linear' has no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be at least 1"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 1}},
            "field 'beta_fast' of rotary scaling 'linear'",
        ),
        ({"rope_parameters": {"rope_type": "default", "beta_fast": 1}}, "rotary fields ['beta_fast'] are given"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "rotary scaling None is not known"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_understood_is_an_error(fields: dict, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read(SMALL | fields)
    assert message in str(error.value)
    assert str(error.value).startswith("config.json")


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_size_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json has no '{name}'"):
        read({theirs: value for theirs, value in SMALL.items() if theirs != name})


def test_harmless_fields_pass() -> None:
    harmless = {
        "_name_or_path": "x",
        "_attn_implementation_autoset": True,
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": [1, 2],
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "quantization_config": None,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        "unsloth_fixed": True,
        "use_cache": False,
    }
    assert config_of(SMALL | harmless) == config_of(SMALL)


COMMON = """
  "attention_bias": false, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
  "rms_norm_eps": 1e-05, "use_cache": true, "torch_dtype": "bfloat16"
"""
LLAMA3 = """
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 128000, "eos_token_id": 128001,
  "mlp_bias": false, "max_position_embeddings": 131072, "num_attention_heads": 32, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rope_theta": 500000.0, "vocab_size": 128256
"""
GRANITE = """
  "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_bias": false, "attention_dropout": 0.1,
  "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "mlp_bias": false, "max_position_embeddings": 131072,
  "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rope_scaling": null,
  "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tie_word_embeddings": true, "vocab_size": 49155
"""
REAL = {
    "Llama-2-7b": """{
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    "Llama-3.1-8B": f"""{{{COMMON}, {LLAMA3},
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": false,
        "rope_scaling": {{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        "transformers_version": "4.43.0.dev0"}}""",
    "Llama-3.2-1B": f"""{{{COMMON}, {LLAMA3},
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "rope_scaling": {{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        "tie_word_embeddings": true, "transformers_version": "4.45.0.dev0"}}""",
    "TinyLlama-1.1B": f"""{{{COMMON}, "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1,
        "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "transformers_version": "4.35.0", "vocab_size": 32000}}""",
    "SmolLM2-135M-Instruct": f"""{{{COMMON}, "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": true,
        "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
        "transformers_version": "4.42.3", "vocab_size": 49152,
        "transformers.js_config": {{"kv_cache_dtype": {{"q4f16": "float16", "fp16": "float16"}}}}}}""",
    "granite-3.1-2b": f"""{{{COMMON}, {GRANITE}, "attention_multiplier": 0.015625, "hidden_size": 2048,
        "intermediate_size": 8192, "logits_scaling": 8.0, "rope_theta": 5000000.0,
        "transformers_version": "4.47.0"}}""",
    "granite-3.1-8b": f"""{{{COMMON}, {GRANITE}, "attention_multiplier": 0.0078125, "hidden_size": 4096,
        "intermediate_size": 12800, "logits_scaling": 16.0, "rope_theta": 10000000.0,
        "transformers_version": "4.47.0"}}""",
}


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("Llama-2-7b", llama.VARIANTS["7b"]),
        ("Llama-3.1-8B", llama.VARIANTS["3.1-8b"]),
        ("Llama-3.2-1B", llama.VARIANTS["3.2-1b"]),
        (
            "TinyLlama-1.1B",
            llama.VARIANTS["7b"].updated(
                emb_dim=2048, head_dim=64, kvheads=4, nlayers=22, hidden_dim=5632, max_expected_seq_len=2048
            ),
        ),
        (
            "SmolLM2-135M-Instruct",
            llama.LLaMAConfig(
                src_vocab_size=49_152,
                emb_dim=576,
                nheads=9,
                kvheads=3,
                head_dim=64,
                nlayers=30,
                hidden_dim=1536,
                max_expected_seq_len=8192,
                rope_theta=100_000.0,
                tie_heads=True,
                pad_id=2,
            ),
        ),
        ("granite-3.1-2b", granite.VARIANTS["3_1_2b"].updated(p_dropout=0.1)),
        (
            "granite-3.1-8b",
            granite.VARIANTS["8b"].updated(p_dropout=0.1, max_expected_seq_len=131_072, rope_theta=10_000_000.0),
        ),
    ],
)
def test_real_configurations(name: str, want: DecoderConfig) -> None:
    assert config_of(json.loads(REAL[name])) == want


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "has no 'model_type'; known are"),
        ({"model_type": "lama"}, r"architecture 'lama' is not one that this library has \(did you mean 'llama'\?\)"),
        ({"model_type": "gpt_oss"}, "it has .*llama, granite"),
        (SMALL | {"auto_map": {}}, "auto_map={} is not supported"),
    ],
)
def test_a_directory_that_is_not_ours(values: dict, message: str, tmp_path) -> None:
    from safetensors.torch import save_file
    from torch import ones

    save_file({"model.norm.weight": ones(32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        get_model(model_path=tmp_path)
