"""Models by name: variants, arguments, the recipe from a checkpoint, and what other packages can add."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fms.models import Decoder, freeze, get_model, list_models, list_variants, register_model, registry
from fms.models.convert import save_model
from fms.models.llama import HF, LLaMA, LLaMAConfig
from fms.models.registry import build
from fms.modules.attention import Attention
from fms.modules.block import Block
from fms.modules.feedforward import GatedLinearUnit
from fms.modules.head import Head
from fms.modules.positions import Rope
from fms.utils.config import DecoderConfig
from fms.utils.generation import generate
from fms.utils.serialization import sources
from fms.utils.serialization.config_hf import hf_map
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.sources import list_sources, register_source

SMALL: dict[str, Any] = {"nlayers": 1, "src_vocab_size": 40, "emb_dim": 16, "head_dim": 4, "hidden_dim": 24}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A Hugging Face directory of a random LLaMA in bf16."""
    model = get_model("llama", "micro", data_type="bf16", **SMALL)
    return save_model(model, tmp_path / "small", "hf")


# Parameters, those of a tied head once.
PARAMETERS = """
gpt_bigcode santacoder  1124886528
gpt_bigcode ibm.3b      3197153280
gpt_bigcode ibm.13b    13077390336
gpt_bigcode ibm.20b    20066993152
gpt_bigcode micro          2192544
granite 8b              8170848256
granite 3_1_2b          2533531648
llama 7b                6738415616
llama 13b              13015864320
llama 70b              68976648192
llama 2-7b              6738415616
llama 2-13b            13015864320
llama 2-70b            68976648192
llama 3-8b              8030261248
llama 3.1-8b            8030261248
llama 3.2-1b            1235814400
llama 3.2-3b            3212749824
llama granite-7b        6738481152
llama granite.code-3b   3482503680
llama granite.code-8b   8054910976
llama micro                2312256
"""


def test_variants_and_their_sizes() -> None:
    rows = []
    for architecture in dict.fromkeys(line.split()[0] for line in PARAMETERS.strip().splitlines()):
        for variant in list_variants(architecture):
            with torch.device("meta"):
                model = build(architecture, variant, {})
            size = sum(p.numel() for p in model.parameters())
            name = f"{architecture} {variant}"
            rows.append(f"{name:22} {size:>11}")
    assert "\n".join(rows) == PARAMETERS.strip()


KEYS = """
embedding.weight                 [40, 16]
layers.0.ln.weight               [16]
layers.0.attn.query.weight       [16, 16]
layers.0.attn.query.bias         [16]
layers.0.attn.key.weight         [8, 16]
layers.0.attn.key.bias           [8]
layers.0.attn.value.weight       [8, 16]
layers.0.attn.value.bias         [8]
layers.0.attn.dense.weight       [16, 16]
layers.0.attn.dense.bias         [16]
layers.0.ff_ln.weight            [16]
layers.0.ff.wg.weight            [24, 16]
layers.0.ff.wg.bias              [24]
layers.0.ff.w1.weight            [24, 16]
layers.0.ff.w1.bias              [24]
layers.0.ff.w2.weight            [16, 24]
layers.0.ff.w2.bias              [16]
dec_norm.weight                  [16]
head.weight                      [40, 16]
"""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_state_dict_keys(architecture: str, tied: bool) -> None:
    shape = {"nheads": 4, "kvheads": 2, "attn_bias": True, "mlp_bias": True, "tie_heads": tied}
    model = get_model(architecture, **(SMALL | shape))
    for state in (model.state_dict(), freeze(model).state_dict()):
        rows = [f"{name:32} {list(tensor.shape)}" for name, tensor in state.items()]
        assert "\n".join(rows) == KEYS.strip()
    assert (model.head.weight is model.embedding.weight) == tied


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give an architecture"),
        ({"architecture": "lama"}, "no architecture 'lama' (did you mean 'llama'?)"),
        ({"architecture": "llama", "variant": "7B"}, "llama has no variant '7B' (did you mean '7b'?)"),
        ({"architecture": "llama", "source": "hf"}, "source='hf' is the format of a model_path, and there is none"),
        ({"data_type": "bf17"}, "data_type='bf17' is not known (did you mean 'bf16'?)"),
        ({"data_type": torch.int8}, "data_type=torch.int8 is not known"),
        ({"data_type": 16}, "data_type=16"),
        ({"device_type": "cpo"}, "device_type='cpo'"),
        ({"distributed_strategy": "fsdq"}, "distributed_strategy='fsdq' is not known"),
        ({"emb_dims": 8}, "LLaMAConfig has no field 'emb_dims' (did you mean 'emb_dim'?)"),
        ({"strickt": False}, "LLaMAConfig has no field 'strickt'"),
        ({"config": None}, "LLaMAConfig has no field 'config'"),
        ({"logits_scaling": 2.0}, "LLaMAConfig has no field 'logits_scaling'"),
        ({"rope_scaling": {"kind": "linear", "factr": 2}}, "RopeScaling has no field 'factr' (did you mean 'factor'?)"),
        ({"rope_scaling": {"kind": "liner"}}, "rotary scaling kind 'liner'"),
        ({"kvheads": 3}, "nheads=4 must be a multiple of kvheads=3"),
        ({"kvheads": 0}, "kvheads=0 must be a whole number of at least 1"),
        ({"nlayers": "2"}, "nlayers='2' must be a whole number"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"attn_bias": "no"}, "attn_bias='no' must be True or False"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a number"),
        ({"norm_eps": None}, "norm_eps=None must be a number"),
        ({"architecture": "models/x"}, "no architecture 'models/x' (a path is model_path=...); there are"),
        ({"pad_id": 256}, "pad_id=256 must lie in the vocabulary of 256"),
        ({"p_dropout": 1.0}, "p_dropout=1.0 must lie in [0, 1)"),
        ({"activation_fn": "sulu"}, "activation_fn='sulu' is not known (did you mean 'silu'?)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_that_are_not_understood_are_errors(arguments: dict, message: str) -> None:
    if arguments and "architecture" not in arguments:
        arguments = {"architecture": "llama", "variant": "micro"} | arguments
    with pytest.raises((ValueError, KeyError)) as error:
        get_model(**arguments)
    assert message in str(error.value.args[0])


def test_overrides() -> None:
    scaling = {"kind": "linear", "factor": 2.0, "original_max_len": 64}
    model = get_model("llama", "micro", nlayers=1, max_expected_seq_len=64, rope_scaling=scaling, hidden_dim=8)
    assert (model.config.nlayers, model.config.hidden_dim, model.config.max_positions) == (1, 8, 128)
    assert model(torch.ones(1, 128, dtype=torch.long)).shape == (1, 128, 256)
    with pytest.raises(ValueError, match=r"129 positions are more than the 128 .*max_expected_seq_len=64"):
        model(torch.ones(1, 129, dtype=torch.long))
    assert (
        get_model("llama", "3.2-1b", device_type="meta", rope_scaling={"factor": 4.0}).config.rope_scaling.factor == 4
    )


def test_config_goes_to_json_and_back(tmp_path: Path) -> None:
    with torch.device("meta"):
        configs = [build(a, v, {}).config for a in list_models() for v in list_variants(a)]
    for config in configs:
        config.save(tmp_path / "config.json")
        assert type(config).load(tmp_path / "config.json") == config
    with pytest.raises(ValueError, match=r"LLaMAConfig has no field 'emb_dims' \(did you mean 'emb_dim'\?\)"):
        LLaMAConfig.from_dict({"emb_dims": 3})


@pytest.mark.parametrize(
    ("path", "data_type", "want"),
    [
        (False, None, torch.float64),  # torch's default
        (False, "fp16", torch.float16),
        (False, torch.bfloat16, torch.bfloat16),
        (True, None, torch.bfloat16),  # the checkpoint's
        (True, "float32", torch.float32),
        (True, torch.float16, torch.float16),
    ],
)
def test_dtype(path: bool, data_type: Any, want: torch.dtype, small: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        given = {"model_path": small} if path else {"architecture": "llama", "variant": "micro", **SMALL}
        model = get_model(**given, data_type=data_type)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {want}
    assert model(torch.ones(1, 3, dtype=torch.long)).dtype == want


def rewrite(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Change tensors of a directory of one file: `None` takes one out."""
    state = load_file(directory / "model.safetensors") | change
    save_file({k: v for k, v in state.items() if v is not None}, directory / "model.safetensors")


def test_missing_and_left_over_keys(small: Path) -> None:
    before = get_model(model_path=small)
    query = "model.layers.0.self_attn.q_proj.weight"
    rewrite(small, {query: None, "model.norm.weight": None, "model.extra.weight": torch.ones(2)})
    with pytest.raises(CheckpointError) as error:
        get_model(model_path=small)
    assert "model.extra.weight: the model has no place for it" in str(error.value)
    assert "layers.0.attn.query.weight: nothing in the checkpoint fills it" in str(error.value)
    assert "dec_norm.weight: nothing in the checkpoint fills it" in str(error.value)

    model = get_model(model_path=small, strict=False)
    assert torch.equal(model.head.weight, before.head.weight)
    assert not torch.equal(model.layers[0].attn.query.weight, before.layers[0].attn.query.weight)
    assert torch.equal(model.dec_norm.weight, torch.ones(16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.layers[0].attn.query.weight.float().std() < 0.1  # random, not what lay in memory


def test_a_wrong_shape_is_an_error_even_if_not_strict(small: Path) -> None:
    rewrite(small, {"lm_head.weight": torch.ones(41, 16)})
    message = r"head.weight: lm_head.weight has shape \[41, 16\], the model wants \[40, 16\]"
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=message):
            get_model(model_path=small, strict=strict)


def test_a_wrong_shape_names_the_variant_that_would_fit(tmp_path: Path) -> None:
    directory = save_model(get_model("llama", "micro"), tmp_path / "micro", "fms")
    assert get_model("llama", "micro", directory).config.nlayers == 5
    with pytest.raises(CheckpointError, match="it fits llama micro"):
        get_model("llama", "3.2-1b", directory)
    with pytest.raises(CheckpointError, match="carries no configuration: name a variant of llama: 7b, 13b"):
        get_model("llama", model_path=directory)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_finite(bad: float, small: Path) -> None:
    value = load_file(small / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    value[3, 2] = bad
    rewrite(small, {"model.layers.0.self_attn.v_proj.weight": value})
    with pytest.raises(CheckpointError, match=r"layers.0.attn.value.weight \(from model.layers.0.self_attn.v_proj"):
        get_model(model_path=small, check_finite=True)
    model = get_model(model_path=small)
    with pytest.raises(ValueError, match="row 0: logits are not finite at new token 1"):
        generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=2)


def test_a_directory_against_what_was_asked_for(small: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'llama'.* not 'granite'"):
        get_model("granite", model_path=small)
    with pytest.raises(CheckpointError, match=r"is not the variant 'micro', which has .*emb_dim=192 \(16\)"):
        get_model("llama", "micro", small)
    assert get_model("llama", "micro", small, **SMALL).config.emb_dim == 16
    assert get_model("llama", "micro", small, **SMALL, max_expected_seq_len=9).config.max_positions == 9
    with pytest.raises(KeyError, match="no architecture 'lama'"):
        get_model("lama", model_path=small)
    with pytest.raises(CheckpointError, match="no checkpoints of source 'hg'"):
        get_model("llama", model_path=small, source="hg")


@pytest.fixture
def other_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is registered inside is forgotten after."""
    monkeypatch.setattr(registry, "_FACTORIES", {a: dict(v) for a, v in registry._FACTORIES.items()})
    monkeypatch.setattr(sources, "_SOURCES", {a: dict(s) for a, s in sources._SOURCES.items()})
    return


@pytest.mark.usefixtures("other_package")
def test_another_package_adds_an_architecture(tmp_path: Path) -> None:
    tiny = DecoderConfig(**SMALL, nheads=4, kvheads=2)

    def layer_norm_llama(**overrides: Any) -> Decoder:
        c = tiny.updated(**overrides)
        norm = lambda: nn.LayerNorm(c.emb_dim, c.norm_eps)
        attn = lambda: Attention(c.emb_dim, c.nheads, c.kvheads, c.head_dim)
        ff = lambda: GatedLinearUnit(c.emb_dim, c.hidden_dim, "relu")
        blocks = [Block(norm(), attn(), norm(), ff()) for _ in range(c.nlayers)]
        embedding, head = nn.Embedding(c.src_vocab_size, c.emb_dim), Head(c.emb_dim, c.src_vocab_size)
        return Decoder(c, embedding, blocks, norm(), head, Rope(c.head_dim))

    register_model("layer_norm_llama", "tiny", layer_norm_llama)
    register_source("layer_norm_llama", "hf", HF, hf_map("layer_norm_llama", "LayerNormLlamaForCausalLM"))

    assert "layer_norm_llama" in list_models()
    model = get_model("layer_norm_llama", "tiny", nlayers=2)
    save_model(model, tmp_path / "out", "hf")
    again = get_model(model_path=tmp_path / "out")
    ids = torch.randint(40, (2, 9))
    assert torch.equal(again(ids), model(ids))
    torch.testing.assert_close(freeze(again)(ids), model(ids))
    with pytest.raises(KeyError, match="layer_norm_llama tiny is registered already"):
        register_model("layer_norm_llama", "tiny", layer_norm_llama)
    with pytest.raises(KeyError, match="layer_norm_llama has a source 'hf' already"):
        register_source("layer_norm_llama", "hf", [])


@pytest.mark.usefixtures("other_package")
def test_another_package_adds_a_source(tmp_path: Path) -> None:
    rules = [(theirs.replace("model.", "backbone.").replace("self_attn", "mixer"), *ours) for theirs, *ours in HF]
    register_source("llama", "mine", rules)
    assert list_sources("llama") == ["hf", "meta", "gguf", "fms", "mine", "own"]

    model = LLaMA(LLaMAConfig(**SMALL, nheads=4, kvheads=4))
    model.reset_parameters()
    theirs = {"embedding": "backbone.embed_tokens", "dec_norm": "backbone.norm", "head": "lm_head"}
    theirs |= {f"layers.0.attn.{n}": f"backbone.layers.0.mixer.{n[0]}_proj" for n in ("query", "key", "value")}
    theirs |= {
        "layers.0.attn.dense": "backbone.layers.0.mixer.o_proj",
        "layers.0.ln": "backbone.layers.0.input_layernorm",
    }
    theirs |= {"layers.0.ff_ln": "backbone.layers.0.post_attention_layernorm"}
    theirs |= {f"layers.0.ff.{a}": f"backbone.layers.0.mlp.{b}_proj" for a, b in (("wg", "gate"), ("w1", "up"))}
    theirs |= {"layers.0.ff.w2": "backbone.layers.0.mlp.down_proj"}
    save_file({f"{theirs[k[:-7]]}.weight": v for k, v in model.state_dict().items()}, tmp_path / "x.safetensors")

    again = get_model("llama", "micro", tmp_path / "x.safetensors", source="mine", **SMALL)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
