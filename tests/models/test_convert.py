"""Checkpoints from each format to each other and back, what transformers makes of ours, and what `validate` sees."""

import json
import re
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from fms.models import freeze, get_model, registry
from fms.models.convert import convert, save_model, validate
from fms.models.decoder import Decoder
from fms.models.granite import Granite, GraniteConfig
from fms.models.llama import LLaMA, LLaMAConfig
from fms.modules.positions import RopeScaling
from fms.utils.generation import generate
from fms.utils.serialization.checkpoint import open_checkpoint
from fms.utils.serialization.errors import CheckpointError
from fms.utils.tokenizers import get_tokenizer

SIZES = {
    "src_vocab_size": 67,
    "emb_dim": 32,
    "nheads": 4,
    "kvheads": 2,
    "head_dim": 8,
    "nlayers": 2,
    "hidden_dim": 48,
    "max_expected_seq_len": 4096,  # what a params.json of this kind means
}
TINY = LLaMAConfig(**SIZES)
LLAMA3 = RopeScaling("llama3", factor=4.0, original_max_len=8192)
CONFIGS = {
    "gqa": TINY.updated(pad_id=3, p_dropout=0.1, norm_eps=1e-6),
    "tied": TINY.updated(tie_heads=True, rope_theta=500.0),
    "biased": TINY.updated(attn_bias=True, mlp_bias=True, kvheads=4),
    "llama3": TINY.updated(rope_scaling=LLAMA3, max_expected_seq_len=131_072),
    "granite": GraniteConfig(
        **SIZES,
        tie_heads=True,
        embedding_multiplier=3.0,
        logits_scaling=0.8,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
    ),
}
HOLD = {
    name: ("hf", "fms", "own") if name in ("biased", "granite") else ("hf", "meta", "fms", "own") for name in CONFIGS
}
NOT_IN_META = {"pad_id": None, "p_dropout": 0.0}  # and what they come back as
BFLOAT16 = {"tied"}


def architecture(config: LLaMAConfig | GraniteConfig) -> str:
    return "granite" if isinstance(config, GraniteConfig) else "llama"


def random_model(config: LLaMAConfig | GraniteConfig) -> Decoder:
    name = architecture(config)
    model = registry.build(name, registry.list_variants(name)[0], config.as_dict()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def contents(path: Path) -> dict[str, Tensor]:
    reader = open_checkpoint(path, architecture="llama" if (path / "model.safetensors").exists() else None).reader
    return {key: reader.read(key) for key in list(reader.keys())}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Each configuration's model in each format that holds it, and as a variant "tiny" for files that carry none."""
    root = tmp_path_factory.mktemp("saved")
    directories = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, config in CONFIGS.items():
            torch.manual_seed(0)
            model = random_model(config).to(torch.bfloat16 if name in BFLOAT16 else torch.float32)
            for to in HOLD[name]:
                directories[name, to] = save_model(model, root / f"{name}-{to}", to)
            factory = partial(Granite if architecture(config) == "granite" else LLaMA, config)
            patch.setitem(registry._FACTORIES[architecture(config)], name, factory)
        yield directories


def given(name: str, source: str) -> dict[str, str]:
    """What must be said of a directory of this format."""
    return {"architecture": architecture(CONFIGS[name]), "variant": name} if source == "fms" else {}


@pytest.mark.parametrize(
    ("name", "start", "to"), [(name, *pair) for name in CONFIGS for pair in permutations(HOLD[name], 2)]
)
def test_there_and_back_is_the_same_bit_for_bit(saved, tmp_path, name, start, to):
    there = convert(saved[name, start], tmp_path / "there", to, **given(name, start))
    back = convert(there, tmp_path / "back", start, **given(name, to))
    if start == "fms":  # carries no configuration, so both need to be told
        kwargs = {"source": "fms", "architecture": architecture(CONFIGS[name])}
    else:
        kwargs = {}
    first, last = (open_checkpoint(path, **kwargs) for path in (saved[name, start], back))
    keys = list(first.reader.keys())
    assert keys == list(last.reader.keys())
    for key in keys:
        assert first.reader.dtype(key) == last.reader.dtype(key)
        assert torch.equal(first.reader.read(key), last.reader.read(key)), key
    fields = first.fields
    assert (fields is None) == (start == "fms")
    if fields and to == "meta":
        fields = fields | {field: value for field, value in NOT_IN_META.items() if field in fields}
    assert last.fields == fields


@pytest.mark.parametrize(("name", "to"), [(name, to) for name in CONFIGS for to in HOLD[name]])
def test_each_format_gives_the_model_back(saved, name, to):
    torch.manual_seed(0)
    model = random_model(CONFIGS[name]).to(torch.bfloat16 if name in BFLOAT16 else torch.float32)
    back = get_model(model_path=saved[name, to], **given(name, to)).eval()
    assert back.config == model.config.updated(**(NOT_IN_META if to == "meta" else {}))
    assert same(back.state_dict(), model.state_dict())
    assert (back.head.weight is back.embedding.weight) == model.config.tie_heads
    ids = torch.randint(67, (2, 20))
    assert torch.equal(back(ids), model(ids))


YARN = {"factor": 4.0, "original_max_len": 16, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}
TO_TRANSFORMERS = CONFIGS | {
    "linear": TINY.updated(rope_scaling=RopeScaling("linear", factor=2.5, original_max_len=4096)),
    "dynamic": TINY.updated(rope_scaling=RopeScaling("dynamic", factor=2.0, original_max_len=16)),
    "yarn": TINY.updated(rope_scaling=RopeScaling("yarn", **YARN)),
    "yarn, granite": CONFIGS["granite"].updated(rope_scaling=RopeScaling("yarn", **YARN, truncate=False)),
    "head_dim": TINY.updated(head_dim=12),
    "gelu": TINY.updated(activation_fn="gelu_tanh"),
}


@pytest.mark.parametrize("name", TO_TRANSFORMERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_transformers_loads_what_is_saved_as_hf(tmp_path, name, frozen):
    config = TO_TRANSFORMERS[name]
    model = random_model(config)
    out = save_model(freeze(model) if frozen else model, tmp_path / "hf", "hf")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == ("GraniteForCausalLM" if "granite" in name else "LlamaForCausalLM")
    ids = torch.randint(67, (2, 40))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    assert get_model(model_path=out).config == model.config.updated(
        **({"max_expected_seq_len": 16} if name == "dynamic" else {})  # theirs is the length before it is stretched
    )


@pytest.mark.slow
def test_real_gguf_to_hf_is_what_transformers_reads_from_the_gguf(smollm2, tmp_path):
    out = convert(smollm2, tmp_path / "hf", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    exported = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert same(exported.state_dict(), theirs.state_dict())
    del exported

    model = freeze(get_model(model_path=out))
    tokenizer = get_tokenizer(out)
    texts = ["The capital of France is", "def fibonacci(n):\n", "1, 2, 3, 5, 8,"]
    prompts = [torch.tensor(tokenizer.encode(text)) for text in texts]
    with torch.no_grad():
        for prompt in prompts:
            expected = theirs(prompt[None]).logits
            torch.testing.assert_close(model(prompt[None]), expected, atol=1e-4, rtol=1e-5)
    ours = generate(model, prompts, max_new_tokens=24, eos_token_id=(), do_sample=False)
    theirs.generation_config.eos_token_id = None
    for prompt, row in zip(prompts, ours, strict=True):
        mask = torch.ones_like(prompt[None])
        expected = theirs.generate(prompt[None], attention_mask=mask, max_new_tokens=24, do_sample=False)
        assert row.tolist() == expected[0].tolist()


CANNOT = {
    "attention bias to meta": (CONFIGS["biased"], "meta", CheckpointError, "params.json cannot say attn_bias=True"),
    "mlp bias to meta": (TINY.updated(mlp_bias=True), "meta", CheckpointError, "cannot say mlp_bias=True"),
    "yarn to meta": (TO_TRANSFORMERS["yarn"], "meta", CheckpointError, "cannot say rope_scaling=.*yarn"),
    "head_dim to meta": (TINY.updated(head_dim=12), "meta", CheckpointError, "cannot say head_dim=12, only 8"),
    "gelu to meta": (TO_TRANSFORMERS["gelu"], "meta", CheckpointError, "cannot say activation_fn='gelu_tanh'"),
    "other llama3 to meta": (
        TINY.updated(rope_scaling=RopeScaling("llama3", 4.0, 16)),
        "meta",
        CheckpointError,
        "cannot say rope_scaling=.*original_max_len=16.*only.*original_max_len=8192",
    ),
    "granite to meta": (CONFIGS["granite"], "meta", ValueError, "granite can't be written as 'meta', only as hf, fms"),
    "gguf": (TINY, "gguf", ValueError, "llama can't be written as 'gguf', only as hf, meta, fms, own"),
    "a misspelt format": (TINY, "meto", ValueError, "did you mean 'meta'"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_a_format_cannot_hold_is_an_error_before_anything_is_written(tmp_path, case):
    config, to, error, message = CANNOT[case]
    start = save_model(random_model(config), tmp_path / "start")
    (tmp_path / "into").mkdir()
    with pytest.raises(error, match=message):
        convert(start, tmp_path / "into" / "out", to)
    assert not list((tmp_path / "into").iterdir())


def test_data_type_is_the_one_asked_for(saved, tmp_path):
    out = convert(saved["gqa", "own"], tmp_path / "half", "hf", data_type="bfloat16")
    start, half = contents(saved["gqa", "hf"]), contents(out)
    assert same(half, {key: value.bfloat16() for key, value in start.items()})
    config = config_of(out)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_progress_ends_with_all_bytes(saved, tmp_path):
    seen: list[tuple[int, int]] = []
    convert(saved["gqa", "own"], tmp_path / "out", "meta", progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in contents(saved["gqa", "own"]).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


SETTINGS = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def with_tokenizer(saved, tmp_path) -> Path:
    """An hf directory with a tokenizer, its template, and a generation_config.json."""
    directory = convert(saved["gqa", "own"], tmp_path / "with_tokenizer", "hf")
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "hello", "world", "<end>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (directory / "generation_config.json").write_text(json.dumps(SETTINGS | {"transformers_version": "5.0"}))
    (directory / "manifest.json").unlink()
    return directory


def test_tokenizer_and_generation_config_travel_along(with_tokenizer, tmp_path):
    own = convert(with_tokenizer, tmp_path / "own", "own")
    back = convert(own, tmp_path / "back", "hf")
    for out in (own, back):
        for name in TOKENIZER_FILES:
            assert (out / name).read_bytes() == (with_tokenizer / name).read_bytes()
        assert json.loads((out / "generation_config.json").read_text()) == SETTINGS
        assert get_model(model_path=out).generation_defaults == SETTINGS
        assert validate(out) == []
    assert config_of(back)["eos_token_id"] == [2, 5]
    assert transformers.GenerationConfig.from_pretrained(back).eos_token_id == [2, 5]
    for to in ("meta", "fms"):
        out = convert(with_tokenizer, tmp_path / to, to)
        assert get_tokenizer(out).encode("hello world") == [3, 4]


def test_a_file_takes_along_the_tokenizer_beside_it(with_tokenizer, tmp_path):
    out = convert(with_tokenizer / "model.safetensors", tmp_path / "out", "own")
    assert get_tokenizer(out).encode("hello world") == [3, 4]


def test_hf_says_the_end_token_that_the_tokenizer_has(with_tokenizer, tmp_path):
    """transformers would take 2, the end of Llama 2's texts, for any model that says nothing."""
    (with_tokenizer / "generation_config.json").unlink()
    meta = convert(with_tokenizer, tmp_path / "meta", "meta")
    (meta / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert config_of(convert(meta, tmp_path / "hf", "hf"))["eos_token_id"] == 5
    assert config_of(save_model(random_model(TINY), tmp_path / "bare", "hf"))["eos_token_id"] is None


def test_a_frozen_model_is_saved_under_the_same_names(with_tokenizer, tmp_path):
    model = get_model(model_path=with_tokenizer).eval()
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    for to in ("own", "hf", "meta", "fms"):
        directory = save_model(freeze(model), tmp_path / to, to, tokenizer=get_tokenizer(with_tokenizer))
        back = get_model(model_path=directory, **given("gqa", to))
        assert same(back.state_dict(), whole)
        assert get_tokenizer(directory).encode("hello") == [3]
    assert get_model(model_path=tmp_path / "own").generation_defaults == model.generation_defaults


def test_an_existing_directory_is_refused_unless_overwritten(saved, tmp_path):
    out = convert(saved["gqa", "own"], tmp_path / "out", "hf")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(saved["tied", "own"], out, "hf")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    convert(saved["tied", "own"], out, "meta", overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["consolidated.00.pth", "manifest.json", "params.json"]
    assert get_model(model_path=out).config.tie_heads


@pytest.mark.parametrize("to", ["hf", "meta", "fms", "own"])
def test_a_flipped_bit_is_found_by_the_manifest(saved, tmp_path, to):
    out = convert(saved["gqa", "own"], tmp_path / "out", to)
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(manifest) == sorted(path.name for path in out.iterdir() if path.name != "manifest.json")
    assert validate(out, **given("gqa", to)) == []
    weights = out / ("consolidated.00.pth" if to == "meta" else "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    (problem,) = validate(out, **given("gqa", to))
    assert f"{weights.name}: damaged" in problem


def rewritten(directory: Path, **changes: Tensor | None) -> Path:
    """The same with some tensors replaced or left out, and without its manifest."""
    file = directory / "model.safetensors"
    tensors = contents(directory) | {key: value for key, value in changes.items() if value is not None}
    save_file({k: v for k, v in tensors.items() if changes.get(k, v) is not None}, file)
    (directory / "manifest.json").unlink(missing_ok=True)
    return directory


def test_validate_counts_what_is_not_finite(saved, tmp_path):
    out = convert(saved["gqa", "own"], tmp_path / "out", "hf")
    bad = contents(out)["model.layers.1.mlp.up_proj.weight"]
    bad[3, 5], bad[0, 0] = float("nan"), -float("inf")
    norm = torch.full((32,), float("nan"))
    rewritten(out, **{"model.layers.1.mlp.up_proj.weight": bad, "model.norm.weight": norm})
    assert sorted(validate(out)) == [
        "model.layers.1.mlp.up_proj.weight: 2 of 1536 values are NaN or infinite",
        "model.norm.weight: 32 of 32 values are NaN or infinite",
    ]
    with pytest.raises(CheckpointError, match=r"not finite: layers.1.ff.w1.weight .*, dec_norm.weight"):
        get_model(model_path=out, check_finite=True)


def test_validate_names_keys_that_are_missing_left_over_or_misshapen(saved, tmp_path):
    out = convert(saved["gqa", "own"], tmp_path / "out", "hf")
    rewritten(out, **{"model.norm.weight": None, "lm_head.weight": torch.zeros(66, 32), "extra.weight": torch.zeros(1)})
    problems = validate(out)
    assert "does not fit the model" in problems[0]
    assert sorted(problems[1:]) == [
        "dec_norm.weight: nothing in the checkpoint fills it (did you mean 'extra.weight'?)",
        "extra.weight: the model has no place for it",
        "head.weight: lm_head.weight has shape [66, 32], the model wants [67, 32]",
    ]


CONFIG_FAULTS = {
    "unknown": ({"num_hiden_layers": 3}, "'num_hiden_layers'.*did you mean 'num_hidden_layers'"),
    "missing": ({"hidden_size": None}, "hidden_size"),
    "model_type": ({"model_type": "lama"}, "'lama'.*did you mean 'llama'.*it has .*llama, granite"),
    "heads": ({"num_key_value_heads": 3}, "nheads=4 must be a multiple of kvheads=3"),
}


@pytest.mark.parametrize("case", CONFIG_FAULTS)
def test_validate_names_faults_of_the_configuration(saved, tmp_path, case):
    changes, message = CONFIG_FAULTS[case]
    out = convert(saved["gqa", "own"], tmp_path / "out", "hf")
    config = config_of(out) | changes
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (out / "manifest.json").unlink()
    (problem,) = validate(out)
    assert re.search(message, problem), problem


def test_validate_looks_at_the_tokenizer(with_tokenizer):
    words = {f"word{i}": i for i in range(70)}
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    large.save(str(with_tokenizer / "tokenizer.json"))
    (with_tokenizer / "tokenizer_config.json").unlink()
    assert validate(with_tokenizer) == ["the tokenizer has 70 tokens, the model's vocabulary 67"]
    (with_tokenizer / "tokenizer.json").write_text("{")
    (problem,) = validate(with_tokenizer)
    assert "is not a tokenizer.json" in problem


def test_validate_says_what_is_not_there(tmp_path):
    (problem,) = validate(tmp_path / "nowhere")
    assert "no such file or directory" in problem
