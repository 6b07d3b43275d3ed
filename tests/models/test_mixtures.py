"""Mixtral and Granite 4: gradients, ragged rows, names in every format, configurations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fms.models import Decoder, freeze, get_model, list_variants
from fms.models.convert import convert, save_model, validate
from fms.models.mixtral import MISTRAL
from fms.models.registry import build
from fms.utils.serialization.checkpoint import open_checkpoint
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.sources import get_source
from fms.utils.serialization.tables import entries
from fms.utils.serialization.writers import Entry, write_safetensors

transformers = pytest.importorskip("transformers")

SIZES = {
    "src_vocab_size": 61,
    "emb_dim": 32,
    "nheads": 4,
    "kvheads": 2,
    "head_dim": 8,
    "nlayers": 2,
    "hidden_dim": 40,
    "max_expected_seq_len": 64,
}
SCALES = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.8,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
    "pad_id": None,
}
ROUTED = {"num_experts": 5, "top_k_experts": 3}
GRANITE = SIZES | SCALES
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", SIZES | ROUTED),
    "mixtral, window": ("mixtral", SIZES | ROUTED | {"sliding_window": 6, "tie_heads": True, "norm_eps": 1e-6}),
    "granite 4, dense": ("granite_moe_hybrid", GRANITE),
    "granite 4, experts": ("granite_moe_hybrid", GRANITE | ROUTED | {"expert_dim": 24, "tie_heads": False}),
    "granite 4, no rotary": ("granite_moe_hybrid", GRANITE | ROUTED | {"expert_dim": 24, "rotary": False}),
}
each = pytest.mark.parametrize("case", CASES)


def random_model(case: str) -> Decoder:
    architecture, fields = CASES[case]
    model = get_model(architecture, **fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith(("ln.weight", "norm.weight")) else 0.0, 0.15)
    return model


def contents(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


class Held:
    """A reader of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.files = tensors, [Path("held.safetensors")]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        return self.tensors[key][index].clone()


NUMBERS = [("mixtral", "8x7b", 46.7028), ("granite_moe_hybrid", "8b", 8.7916)]


@pytest.mark.parametrize(("architecture", "variant", "billions"), NUMBERS)
def test_variants_have_their_numbers_of_parameters(architecture: str, variant: str, billions: float) -> None:
    assert list_variants(architecture) == [variant]
    with torch.device("meta"):
        model = build(architecture, variant, {})
    count = sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False))
    assert round(count / 1e9, 4) == billions


def test_keys_of_state_dicts() -> None:
    layer = ["ln", "attn.query", "attn.key", "attn.value", "attn.dense", "ff_ln"]
    for case, feed_forward in {
        "mixtral": "ff.gate.weight ff.experts.wg ff.experts.w1 ff.experts.w2",
        "granite 4, dense": "ff.wg.weight ff.w1.weight ff.w2.weight",
        "granite 4, experts": "ff.wg.weight ff.w1.weight ff.w2.weight ff.routed.gate.weight ff.routed.experts.wg "
        "ff.routed.experts.w1 ff.routed.experts.w2",
    }.items():
        names = [f"{name}.weight" for name in layer] + feed_forward.split()
        expected = {f"layers.{i}.{name}" for i in range(2) for name in names}
        expected |= {"embedding.weight", "dec_norm.weight", "head.weight"}
        model = random_model(case)
        assert model.state_dict().keys() == expected
        assert freeze(model).state_dict().keys() == expected


@each
def test_gradients(case: str, tmp_path: Path) -> None:
    """Of every parameter, the router's too, against transformers' under its own names."""
    ours = random_model(case)
    path = save_model(ours, tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager")
    ids = torch.randint(61, (2, 12))
    for logits in (theirs(ids).logits, ours(ids)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    held = Held({name: parameter.grad for name, parameter in theirs.named_parameters()})
    checkpoint = open_checkpoint(path)
    checkpoint = type(checkpoint)(path, "hf", checkpoint.architecture, None, held)
    parts, unknown = checkpoint.parts(ours.config)
    assert not unknown
    for name, parameter in ours.named_parameters():
        want = parts[name].read(held)
        assert want.abs().max() > 0, name
        error = (parameter.grad - want).abs().max() / want.abs().max()
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@each
@torch.no_grad()
def test_ragged_rows_equal_each_row_alone(case: str, frozen: bool) -> None:
    model = random_model(case)
    if frozen:
        freeze(model)
    ids, lengths, tail = torch.randint(61, (3, 10)), (4, 10, 7), torch.randint(61, (3, 4))
    cache = model.make_cache(3, 14)
    cache.take = torch.tensor(lengths)[:, None]
    logits = model(ids, cache=cache)
    after = torch.cat([model(chunk, cache=cache) for chunk in tail.split([2, 1, 1], 1)], 1)
    for i, n in enumerate(lengths):
        alone = model(torch.cat((ids[i, :n], tail[i]))[None])[0]
        close(torch.cat((logits[i, :n], after[i])), alone)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("case", ["mixtral", "granite 4, experts"])
@torch.no_grad()
def test_compiled_a_generation_is_two_graphs(case: str, frozen: bool) -> None:
    torch._dynamo.reset()
    model = random_model(case)
    if frozen:
        freeze(model)
    ids = torch.randint(61, (2, 17))
    want, counter = model(ids), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    cache = model.make_cache(2, 17)
    close(torch.cat([compiled(chunk, cache=cache) for chunk in ids.split([9] + [1] * 8, 1)], 1), want)
    assert counter.frame_count <= 3  # the prefill, the first step, all others
    torch._dynamo.reset()


@each
@torch.no_grad()
def test_to_transformers_and_back(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    ids = torch.randint(61, (2, 20))
    want = model(ids)
    path = save_model(freeze(model), tmp_path / "hf", "hf")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    close(theirs.eval()(ids).logits, want)
    for original in (True, False):  # as files have it since transformers 4, and as 5 has it in memory
        theirs.save_pretrained(tmp_path / f"theirs{original}", save_original_format=original)
        back = get_model(model_path=tmp_path / f"theirs{original}").eval()
        assert back.config == model.config
        assert same(dict(back.state_dict()), dict(model.state_dict()))
        close(back(ids), want)
    assert same(contents(path), contents(tmp_path / "theirsTrue"))

    own = convert(path, tmp_path / "own", "own")
    assert same(contents(convert(own, tmp_path / "again", "hf")), contents(path))
    assert validate(own) == validate(path) == []


@pytest.mark.parametrize("case", ["mixtral", "granite 4, dense"])
@torch.no_grad()
def test_the_existing_fms_names(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    path = save_model(model, tmp_path / "fms", "fms")
    tensors = contents(path)
    if case == "mixtral":
        shapes = {key.split("ff_sub_layer.")[1]: list(t.shape) for key, t in tensors.items() if "1.ff_sub" in key}
        assert shapes == {"gate.weight": [5, 32], "cond_ffn.w13": [5, 80, 32], "cond_ffn.w2": [5, 32, 40]}
        w13 = tensors["base_model.layers.1.ff_sub_layer.cond_ffn.w13"]
        assert torch.equal(w13[3, :40], model.layers[1].ff.experts.wg[3])
        assert torch.equal(w13[3, 40:], model.layers[1].ff.experts.w1[3])
    else:
        assert not any("fused" in key for key in tensors)  # its variant there has fused_weights=False
    architecture, fields = CASES[case]
    back = get_model(architecture, list_variants(architecture)[0], path, **fields)
    assert same(dict(back.state_dict()), dict(model.state_dict()))
    with pytest.raises(CheckpointError, match=r"w13 has 80 rows, the model wants 64|w1.weight has shape \[40, 32\]"):
        get_model(architecture, list_variants(architecture)[0], path, **(fields | {"hidden_dim": 32}))


def mistral_files(model: Decoder, directory: Path, split: bool) -> Path:
    """The model in the original names: experts in one tensor, or, as in later releases, each in its own."""
    rules = [rule for rule in MISTRAL if not split or "block_sparse_moe" not in rule[0]]
    state = [Entry(n, tuple(p.shape), p.dtype, p.detach) for n, p in model.named_parameters()]
    directory.mkdir()
    write_safetensors(directory, entries(rules, state, model.config))
    return directory


@pytest.mark.parametrize("split", [False, True], ids=["", "later"])
def test_the_original_names(split: bool, tmp_path: Path) -> None:
    model = random_model("mixtral")
    path = mistral_files(model, tmp_path / "mistral", split)
    tensors, experts = contents(path), model.layers[1].ff.experts
    if split:
        assert torch.equal(tensors["layers.1.feed_forward.experts.4.w3.weight"], experts.w1[4])
    else:
        assert tensors["layers.1.block_sparse_moe.w2"].shape == (5 * 40, 32)
        assert torch.equal(tensors["layers.1.block_sparse_moe.w2"][80:120], experts.w2[2].mT)
        assert torch.equal(tensors["layers.1.block_sparse_moe.w3"][80:120], experts.w1[2])
    back = get_model("mixtral", "8x7b", path, "mistral", **CASES["mixtral"][1])
    assert same(dict(back.state_dict()), dict(model.state_dict()))
    message = (
        r"w1\.weight has shape \[5, 40, 32\], the model wants" if split else "w1 has 200 rows, the model wants 160"
    )
    for wrong in ({"num_experts": 4}, {"hidden_dim": 32}):
        with pytest.raises(CheckpointError, match=message):
            get_model("mixtral", "8x7b", path, "mistral", **(CASES["mixtral"][1] | wrong))


def test_the_original_files(tmp_path: Path) -> None:
    """Several, each with some of the tensors, beside a params.json."""
    model = random_model("mixtral")
    tensors = contents(mistral_files(model, tmp_path / "mistral", False))
    for i in range(2):
        shard = {key: tensor for key, tensor in tensors.items() if ("layers.1" in key) == bool(i)}
        torch.save(shard, tmp_path / f"consolidated.0{i}.pt")
    (tmp_path / "params.json").write_text('{"dim": 32, "n_layers": 2, "moe": {"num_experts": 5}}')
    back = get_model("mixtral", "8x7b", tmp_path, "mistral", **CASES["mixtral"][1])
    assert same(dict(back.state_dict()), dict(model.state_dict()))


def test_every_rule_is_for_a_name_that_a_model_has() -> None:
    names = {"mixtral": random_model("mixtral"), "granite_moe_hybrid": random_model("granite 4, experts")}
    for architecture, model in names.items():
        have = {name.replace("0", "*").removesuffix(".weight") for name in model.state_dict()}
        for _, target, *_ in get_source(architecture, "hf").rules:
            targets = (target,) if isinstance(target, str) else target or ()
            assert have.issuperset(targets), targets


def changed(directory: Path, **changes: Any) -> Path:
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "manifest.json").unlink(missing_ok=True)
    return directory


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    path = save_model(random_model("mixtral"), tmp_path / "hf", "hf")
    whole = contents(path)
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    for name, message in {
        gone: r"layers\.1\.ff\.experts\.w1 .*no number 2",
        gone.replace("2.w3", "4.w3"): r"\[4, 40, 32\]",
    }.items():
        tensors = [Entry(k, tuple(t.shape), t.dtype, lambda t=t: t) for k, t in whole.items() if k != name]
        write_safetensors(path, tensors)
        with pytest.raises(CheckpointError, match=message):
            get_model(model_path=path)
    odd = {gone: torch.zeros(1, 32)}
    write_safetensors(path, [Entry(k, tuple(t.shape), t.dtype, lambda t=t: t) for k, t in (whole | odd).items()])
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3\.weight has \[1, 32\]"):
        get_model(model_path=path)


def test_mixtral_configurations(tmp_path: Path) -> None:
    model = random_model("mixtral")
    path = save_model(model, tmp_path / "hf", "hf")
    ours = model.config
    fields = open_checkpoint(changed(path, rope_parameters="absent", rope_scaling="absent")).fields
    assert fields == ours.as_dict()  # as transformers 4 writes it
    gone = dict.fromkeys(("rope_theta", "rms_norm_eps", "num_experts_per_tok", "num_local_experts"), "absent")
    fields = open_checkpoint(changed(path, max_position_embeddings="absent", **gone)).fields
    config = transformers.MixtralConfig()
    assert fields is not None
    assert fields["rope_theta"] == config.rope_parameters["rope_theta"]
    assert fields["norm_eps"] == config.rms_norm_eps
    assert (fields["top_k_experts"], fields["num_experts"]) == (config.num_experts_per_tok, config.num_local_experts)
    assert fields["max_expected_seq_len"] == config.max_position_embeddings
    with pytest.raises(CheckpointError, match=r"router_jitter_noise=0\.1"):
        open_checkpoint(changed(path, router_jitter_noise=0.1))
    with pytest.raises(ValueError, match=r"top_k_experts=9 must lie in 1\.\.num_experts=8"):
        get_model("mixtral", **(SIZES | {"top_k_experts": 9}))
    with pytest.raises(ValueError, match="Mixtral has no biases"):
        get_model("mixtral", **(SIZES | {"mlp_bias": True}))


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "state space": ({"layer_types": ["mamba", "attention"]}, r"mamba \(state-space layers\) are not supported"),
    "linear attention": ({"layer_types": ["full_attention", "linear_attention"]}, "state-space layers"),
    "nothing said": ({"layer_types": "absent"}, "state-space layers"),
    "too few": ({"layer_types": ["attention"]}, "layer_types names 1 layers, num_hidden_layers is 2"),
    "positions": ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
    "norm": ({"normalization_function": "layernorm"}, "normalization_function='layernorm'"),
    "choice": ({"num_experts_per_tok": 6}, "num_experts=5, top_k_experts=6"),
    "unknown": ({"num_local_expert": 6}, "did you mean 'num_local_experts'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_granite_4_configurations_that_are_not_understood(fault: str, tmp_path: Path) -> None:
    path = save_model(random_model("granite 4, experts"), tmp_path / "hf", "hf")
    changes, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        get_model(model_path=changed(path, **changes))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts": 4},
        {"top_k_experts": 2},
        {"expert_dim": 8},
        ROUTED,
        ROUTED | {"expert_dim": 0},
        {"mlp_bias": True},
    ],
    ids=str,
)
def test_granite_4_fields_that_do_not_go_together(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"num_experts=.*top_k_experts=.*expert_dim=|mlp_bias=True"):
        get_model("granite_moe_hybrid", **(GRANITE | wrong))


def test_granite_4_as_transformers_4_writes_it(tmp_path: Path) -> None:
    model = random_model("granite 4, no rotary")
    path = save_model(model, tmp_path / "hf", "hf")
    old = {"rope_parameters": "absent", "layers_block_type": ["attention"] * 2, "layer_types": "absent"}
    assert open_checkpoint(changed(path, init_method="mup", mamba_d_conv=4, **old)).fields == model.config.as_dict()
