"""Checkpoints of every format found, told apart and read: what is there says what it is."""

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from fms.models import Decoder, get_model, registry
from fms.models.convert import save_model
from fms.models.granite import Granite, GraniteConfig
from fms.models.llama import LLaMA, LLaMAConfig
from fms.modules.positions import RopeScaling
from fms.utils.serialization.checkpoint import open_checkpoint
from fms.utils.serialization.errors import CheckpointError

SIZES = {
    "src_vocab_size": 40,
    "emb_dim": 32,
    "nheads": 4,
    "kvheads": 2,
    "head_dim": 8,
    "nlayers": 2,
    "hidden_dim": 48,
    "max_expected_seq_len": 4096,
}
TINY = LLaMAConfig(**SIZES)
GRANITE = GraniteConfig(
    **SIZES,
    tie_heads=True,
    embedding_multiplier=6.0,
    logits_scaling=0.5,
    residual_multiplier=0.7,
    attention_multiplier=0.3,
)
IDS = torch.arange(40).view(2, 20)


def random_model(config: LLaMAConfig | GraniteConfig) -> Decoder:
    architecture = "granite" if isinstance(config, GraniteConfig) else "llama"
    model = registry.build(architecture, registry.list_variants(architecture)[0], config.as_dict()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.3)
    return model


@pytest.fixture
def variants(monkeypatch) -> Callable[..., None]:
    """Registers variants for the length of a test."""

    def register(**configs: LLaMAConfig | GraniteConfig) -> None:
        for name, config in configs.items():
            kind = ("granite", Granite) if isinstance(config, GraniteConfig) else ("llama", LLaMA)
            monkeypatch.setitem(registry._FACTORIES[kind[0]], name, partial(kind[1], config))

    return register


def assert_same(model: Decoder, expected: Decoder, **but: object) -> None:
    assert model.config == expected.config.updated(**but)
    state, whole = model.state_dict(), expected.state_dict()
    assert state.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS), expected(IDS))


# What is there says what it is


@pytest.mark.parametrize("config", [TINY, GRANITE])
@pytest.mark.parametrize("to", ["hf", "own"])
@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_directory_and_the_file_in_it_say_all(tmp_path, config, to, name):
    model = random_model(config)
    path = save_model(model, tmp_path / "saved", to) / name
    checkpoint = open_checkpoint(path)
    assert (checkpoint.source, checkpoint.architecture) == (to, model.architecture)
    assert_same(get_model(model_path=path), model)
    assert_same(get_model(model_path=str(path), source=to, architecture=model.architecture), model)


@pytest.mark.parametrize("name", ["", "consolidated.00.pth"])
def test_meta_says_all(tmp_path, name):
    model = random_model(TINY)
    path = save_model(model, tmp_path / "saved", "meta") / name
    assert open_checkpoint(path).source == "meta"
    assert_same(get_model(model_path=path), model)


def test_a_file_without_its_configuration_needs_to_be_told(tmp_path, variants):
    variants(tiny=TINY)
    model = random_model(TINY)
    (tmp_path / "bare").mkdir()
    file = (save_model(model, tmp_path / "saved", "hf") / "model.safetensors").rename(
        tmp_path / "bare" / "x.safetensors"
    )
    with pytest.raises(CheckpointError, match="can't tell its format from its 21 keys: name a source"):
        get_model(model_path=file)
    with pytest.raises(
        CheckpointError, match="hf files do not say which model they are: give architecture and variant"
    ):
        get_model(model_path=file, source="hf")
    with pytest.raises(CheckpointError, match=r"source='hff' is not known \(did you mean 'hf'\?\); known are hf"):
        get_model(model_path=file, source="hff")
    with pytest.raises(CheckpointError, match=r"name a variant of llama: .*tiny"):
        get_model("llama", model_path=file, source="hf")
    with pytest.raises(CheckpointError, match=r"llama has no checkpoints of source 'hff'.*did you mean 'hf'"):
        get_model("llama", "tiny", file, source="hff")
    with pytest.raises(CheckpointError, match=r"tok_embeddings.*|model.norm.weight: the model has no place"):
        get_model("llama", "tiny", file, source="meta")
    assert_same(get_model("llama", "tiny", file, source="hf"), model)


@pytest.mark.parametrize("to", ["hf", "own"])
def test_another_architecture_or_variant_than_the_one_there_is_an_error(tmp_path, to):
    saved = save_model(random_model(TINY), tmp_path / "saved", to)
    with pytest.raises(CheckpointError, match="holds 'llama', not 'granite'"):
        get_model("granite", model_path=saved)
    with pytest.raises(KeyError, match=r"no architecture 'lama'.*did you mean 'llama'"):
        get_model("lama", model_path=saved)
    with pytest.raises(CheckpointError, match=r"not the variant '7b', which has .*emb_dim=4096 \(32\)"):
        get_model("llama", "7b", saved)


def test_sizes_given_may_correct_a_variant_and_must_then_agree(tmp_path, variants):
    model = random_model(TINY)
    saved = save_model(model, tmp_path / "saved", "hf")
    variants(tiny=TINY.updated(max_expected_seq_len=32))
    assert get_model("llama", "tiny", saved).config.max_expected_seq_len == 4096  # what the logits do not depend on
    assert get_model("llama", "tiny", saved, max_expected_seq_len=16).config.max_expected_seq_len == 16
    with pytest.raises(ValueError, match=r"no field 'nlayer'.*did you mean 'nlayers'"):
        get_model(model_path=saved, nlayer=3)


def test_a_wrong_shape_names_the_variants_that_would_fit(tmp_path, variants):
    variants(small=TINY, large=TINY.updated(hidden_dim=64))
    saved = save_model(random_model(TINY), tmp_path / "saved", "hf")
    (saved / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"(?s)has shape \[48, 32\], the model wants \[64, 32\].*it fits llama small"
    ):
        get_model("llama", "large", saved, source="hf")


OWN_FAULTS = {
    "version": ({"version": 2}, "version 2, this library reads 1"),
    "architecture": ({"architecture": None}, "has no 'architecture'"),
    "config": ({"config": None}, "has no 'config'"),
    "field": ({"config": {"nlayer": 2}}, "no field 'nlayer'.*did you mean 'nlayers'"),
}


@pytest.mark.parametrize("case", OWN_FAULTS)
def test_faults_of_our_own_configuration(tmp_path, case):
    changes, message = OWN_FAULTS[case]
    saved = save_model(random_model(TINY), tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text()) | changes
    (saved / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        get_model(model_path=saved)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_configuration_that_is_no_json_object(tmp_path, content):
    saved = save_model(random_model(TINY), tmp_path / "saved", "hf")
    (saved / "config.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"config.json: (not readable as JSON|expected a JSON object, found list)"
    ):
        get_model(model_path=saved)


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A local cache of the Hub as huggingface_hub lays it out."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    return tmp_path / "hub"


def lay_out(hub: Path, name: str, files: Path, revision: str = "main") -> None:
    home, commit = hub / f"models--{name.replace('/', '--')}", f"{len(list(hub.glob('*/refs/*'))):040x}"
    for directory in ("blobs", "refs", f"snapshots/{commit}"):
        (home / directory).mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    for file in files.iterdir():
        blob = home / "blobs" / f"{commit}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (home / "snapshots" / commit / file.name).symlink_to(os.path.relpath(blob, home / "snapshots" / commit))


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, hub):
    model, other = random_model(TINY), random_model(GRANITE)
    lay_out(hub, "org/tiny-1.0", save_model(model, tmp_path / "a", "hf"))
    lay_out(hub, "org/tiny-1.0", save_model(other, tmp_path / "b", "hf"), "next")
    assert_same(get_model(model_path="org/tiny-1.0"), model)
    assert_same(get_model(model_path="org/tiny-1.0@next"), other)


def test_bin_files_of_a_hub_id_are_found(tmp_path, hub):
    theirs = their_llama()
    lay_out(hub, "org/old", old_directory(theirs, tmp_path / "old"))
    model = get_model(model_path="org/old").eval()
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["org/unknown", "org/tiny@v9", "Org with space/x"])
def test_a_hub_id_that_is_not_to_be_had_is_one_error(tmp_path, hub, name):
    lay_out(hub, "org/tiny", save_model(random_model(TINY), tmp_path / "a", "hf"))
    with pytest.raises(CheckpointError, match=f"^{re.escape(name)}: not a file or directory here, and not to be had"):
        get_model(model_path=name)


@pytest.mark.parametrize("name", ["nowhere", "./org/x", "/org/x", "a/b/c", "org/x.gguf", "~/x"])
def test_a_path_that_is_no_hub_id_is_not_looked_for_there(hub, name):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        get_model(model_path=name)


# Meta's directories


def meta_shards(directory: Path, out: Path, embedding_dim: int) -> Path:
    """As Meta's ranks hold them: columns of what is row-parallel, rows of what is column-parallel, norms whole."""
    state = torch.load(directory / "consolidated.00.pth")
    out.mkdir()
    for rank in range(2):
        shard = {"rope.freqs": torch.zeros(4)}
        for key, tensor in state.items():
            kind = key.split(".")[-2]
            dim = {"wo": 1, "w2": 1, "tok_embeddings": embedding_dim}.get(kind, 0)
            shard[key] = tensor if "norm" in kind else tensor.chunk(2, dim)[rank].clone()
        torch.save(shard, out / f"consolidated.{rank:02}.pth")
    return out


@pytest.mark.parametrize("embedding_dim", [0, 1])  # Llama 3's, Llama 2's
def test_meta_shards_are_merged(tmp_path, embedding_dim):
    model = random_model(TINY)
    whole = save_model(model, tmp_path / "whole", "meta")
    out = meta_shards(whole, tmp_path / "sharded", embedding_dim)
    # as they stand beside Llama 2's weights: sizes that the weights tell are not said
    params = {"dim": 32, "multiple_of": 8, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "norm_eps": 1e-05}
    (out / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    assert_same(get_model(model_path=out), model, max_expected_seq_len=4096)


def test_meta_scaling(tmp_path):
    model = random_model(TINY)
    saved = save_model(model, tmp_path / "whole", "meta")
    params = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "norm_eps": 1e-05, "rope_theta": 500000.0}
    params |= {"ffn_dim_multiplier": 1.5, "multiple_of": 256, "vocab_size": 40, "use_scaled_rope": True}
    (saved / "params.json").write_text(json.dumps(params))
    config = get_model(model_path=saved).config
    assert config.rope_scaling == RopeScaling("llama3", factor=32.0, original_max_len=8192)  # small: as 3.2
    assert (config.rope_theta, config.max_expected_seq_len, config.hidden_dim) == (500_000.0, 131_072, 48)
    (saved / "params.json").write_text(json.dumps(params | {"quantization_args": {}}))
    with pytest.raises(CheckpointError, match=r"field 'quantization_args' .* is not known"):
        get_model(model_path=saved)


# Files of the existing FMS


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves to neighbouring pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def existing_fms(model: Decoder, fused: bool) -> dict[str, Tensor]:
    """Its state dict, by hand."""
    c = model.config
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace(".ff.", ".ff_sub_layer.")
        for part, heads in (("query", c.nheads), ("key", c.kvheads), ("value", None)):
            if f".attn.{part}." in name:
                name = name.replace(".attn.", ".attn.in_proj.")
                tensor = tensor if heads is None else interleaved(tensor, heads)
        state[name if name.startswith("head.") else f"base_model.{name}"] = tensor
    if fused:
        for i in range(c.nlayers):
            attn, ff = f"base_model.layers.{i}.attn.in_proj", f"base_model.layers.{i}.ff_sub_layer"
            for kind in ("weight", "bias") if c.attn_bias else ("weight",):
                qkv = [state.pop(f"{attn}.{part}.{kind}") for part in ("query", "key", "value")]
                state[f"{attn}.qkv_fused.{kind}"] = torch.cat(qkv)
            for kind in ("weight", "bias") if c.mlp_bias else ("weight",):
                gate_up = [state.pop(f"{ff}.{part}.{kind}") for part in ("wg", "w1")]
                state[f"{ff}.wg1_fused.{kind}"] = torch.cat(gate_up)
    return state


@pytest.mark.parametrize("config", [TINY, TINY.updated(attn_bias=True, mlp_bias=True, tie_heads=True), GRANITE])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_files_of_the_existing_fms_need_architecture_and_variant(tmp_path, variants, config, fused, wrapped):
    variants(tiny=config)
    model = random_model(config)
    state = existing_fms(model, fused)
    torch.save({"model_state": state} if wrapped else state, tmp_path / "model.pth")
    for path in (tmp_path, tmp_path / "model.pth"):
        with pytest.raises(CheckpointError, match="do not say which model they are: give architecture and variant"):
            get_model(model_path=path)
        with pytest.raises(CheckpointError, match=f"carries no configuration: name a variant of {model.architecture}"):
            get_model(model.architecture, model_path=path)
        assert_same(get_model(model.architecture, "tiny", path), model)
        assert_same(get_model(model.architecture, "tiny", path, source="fms"), model)


# GGUF


def gguf_of(model: Decoder, path: Path, extra: dict[str, np.ndarray] | None = None, **options: object) -> Path:
    """As llama.cpp's converter writes it: fp32, query and key permuted, tied heads once."""
    c = model.config
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_context_length(c.max_expected_seq_len)
    writer.add_embedding_length(c.emb_dim)
    writer.add_block_count(c.nlayers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.nheads)
    writer.add_head_count_kv(c.kvheads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.src_vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if isinstance(c, GraniteConfig):
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_logit_scale(c.logits_scaling)
        writer.add_attention_scale(c.attention_multiplier)
    for name, value in options.items():
        getattr(writer, f"add_{name}")(value)
    arch = gguf.MODEL_ARCH[model.architecture.upper()]
    names = gguf.get_tensor_name_map(arch, c.nlayers)
    hf = {"ln": "input_layernorm", "ff_ln": "post_attention_layernorm", "wg": "mlp.gate_proj", "w1": "mlp.up_proj"}
    hf |= {"w2": "mlp.down_proj", "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
    hf |= {"dense": "self_attn.o_proj", "embedding": "model.embed_tokens", "dec_norm": "model.norm", "head": "lm_head"}
    for name, parameter in model.named_parameters():
        *where, kind, suffix = name.split(".")
        theirs = f"model.layers.{where[1]}.{hf[kind]}" if where else hf[kind]
        data = parameter.detach().numpy()
        if kind in ("query", "key"):
            heads = c.nheads if kind == "query" else c.kvheads
            data = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(f"{theirs}.{suffix}", (".weight", ".bias")), data)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(c: LLaMAConfig, factor: float) -> np.ndarray:
    """`rope_freqs.weight`, one number at a time."""
    found = []
    for i in range(0, c.head_dim, 2):
        wavelength = 2 * math.pi * c.rope_theta ** (i / c.head_dim)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY.updated(head_dim=12, norm_eps=1e-6, rope_theta=500.0),
        TINY.updated(tie_heads=True, attn_bias=True, mlp_bias=True),
        GRANITE,
        GRANITE.updated(attn_bias=True, tie_heads=False),
    ],
)
def test_gguf(tmp_path, config):
    model = random_model(config)
    file = gguf_of(model, tmp_path / "model.gguf")
    for path in (file, tmp_path):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.source, checkpoint.architecture) == ("gguf", model.architecture)
        back = get_model(model_path=path)
        assert back.config == config.updated(pad_id=back.config.pad_id)  # 1e-5 again, though fp32 in the file
        assert_same(back, model, pad_id=back.config.pad_id)


def test_gguf_is_a_variant_that_is_named(tmp_path, variants):
    variants(tiny=TINY)
    file = gguf_of(random_model(TINY), tmp_path / "model.gguf")
    assert get_model("llama", "tiny", file).config.norm_eps == TINY.norm_eps == 1e-5


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_with_llama3_scaling(tmp_path, factor):
    scaling = RopeScaling("llama3", factor=factor, original_max_len=8192)
    config = TINY.updated(rope_scaling=scaling, max_expected_seq_len=131_072, head_dim=32, norm_eps=0.5)
    model = random_model(config)
    divisors = llama3_divisors(config, factor)
    assert len(set(divisors)) > 3  # kept, blended and divided
    file = gguf_of(model, tmp_path / "model.gguf", {"rope_freqs.weight": divisors})
    assert_same(get_model(model_path=file), model)
    odd = gguf_of(model, tmp_path / "odd.gguf", {"rope_freqs.weight": divisors * 1.1})
    with pytest.raises(CheckpointError, match="divisors of no rotary scaling known here"):
        get_model(model_path=odd)


def test_gguf_with_linear_scaling(tmp_path):
    model = random_model(TINY.updated(norm_eps=0.5))
    scaling = {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 2.0}
    back = get_model(model_path=gguf_of(model, tmp_path / "model.gguf", **scaling))
    assert back.config.rope_scaling == RopeScaling("linear", factor=2.0, original_max_len=4096)


def test_gguf_ends_of_a_text_and_of_a_turn(tmp_path):
    model = random_model(TINY)
    one = gguf_of(model, tmp_path / "one.gguf", eos_token_id=3)
    two = gguf_of(model, tmp_path / "two.gguf", eos_token_id=3, eot_token_id=5, eom_token_id=3)
    assert get_model(model_path=one).generation_defaults == {"eos_token_id": 3}
    assert get_model(model_path=two).generation_defaults == {"eos_token_id": [3, 5]}
    with pytest.raises(CheckpointError, match=r"several models: name one of one.gguf, two.gguf"):
        get_model(model_path=tmp_path)


# transformers 4's directories


def their_llama(**fields: object) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **fields,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model


def old_directory(model: transformers.LlamaForCausalLM, out: Path, shards: int = 1, **fields: object) -> Path:
    """As transformers 4 saved: pickles, rotary fields in its form, rotary buffers among the weights."""
    out.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": -1,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "vocab_size": 40,
    }
    (out / "config.json").write_text(json.dumps(config | fields))
    state = dict(model.state_dict())
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    if shards == 1:
        names = ["pytorch_model.bin"]
    where = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        torch.save({key: tensor for key, tensor in state.items() if where[key] == name}, out / name)
    if shards > 1:
        (out / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    torch.save({"lr": 0.1}, out / "training_args.bin")
    return out


OLD = {
    "plain": ({"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    ),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", OLD)
def test_directories_of_transformers_4(tmp_path, case, shards):
    old, parameters = OLD[case]
    theirs = their_llama(rope_parameters=parameters)
    model = get_model(model_path=old_directory(theirs, tmp_path / "old", shards, **old)).eval()
    assert model.generation_defaults == {"eos_token_id": 2}
    assert model.config.pad_id is None
    expected = theirs(IDS).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
