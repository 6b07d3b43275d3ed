"""Vectors of texts: each pooling row by row, what a directory says, cutting, batches; and all of it on real weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from fms.models import freeze, get_model
from fms.utils.embedding import POOLINGS, SIMILARITIES, Recipe, embed, read_recipe, recipe_files, token_rows
from fms.utils.tokenizers import get_tokenizer
from fms.utils.tokenizers.hf import HFTokenizer

TEXTS = ["a man is eating food", "a plane takes off and lands and takes off", "", "food", "a man eats a meal", "a b c"]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]


@pytest.fixture
def tokenizer() -> HFTokenizer:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return HFTokenizer(backend, {"pad_token": 0})


SHAPE: dict[str, Any] = {"nlayers": 2, "src_vocab_size": len(WORDS), "emb_dim": 16, "nheads": 2, "hidden_dim": 24}


@pytest.fixture(params=["bert", "roberta", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    more = {"kvheads": 1, "head_dim": 8} if request.param == "llama" else {"pad_id": 0}
    made = get_model(request.param, max_expected_seq_len=32, **SHAPE, **more)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.4)
    return freeze(made)


def alone(h: Tensor, pooling: str) -> Tensor:
    """Of one row (s, d) without padding."""
    if pooling == "weightedmean":
        return sum((n + 1) * row for n, row in enumerate(h)) / sum(range(len(h) + 1))
    return {
        "cls": h[0],
        "lasttoken": h[-1],
        "max": h.max(0).values,
        "mean": h.mean(0),
        "mean_sqrt_len_tokens": h.sum(0) / len(h) ** 0.5,
    }[pooling]


@pytest.mark.parametrize("pooling", [*POOLINGS, "joined"])
@torch.no_grad()
def test_poolings_of_a_batch_are_those_of_each_text(pooling: str, model: Any, tokenizer: HFTokenizer) -> None:
    names = ("cls", "mean") if pooling == "joined" else (pooling,)
    recipe = Recipe(pooling=names)
    rows = token_rows(model, tokenizer, TEXTS, recipe)
    assert rows[3] == [1, WORDS.index("food"), 2]
    hidden = [model.hidden(torch.tensor([row]))[0] for row in rows]
    want = torch.stack([torch.cat([alone(h, name) for name in names]) for h in hidden])
    for size in (1, 2, 100):
        got = embed(model, tokenizer, TEXTS, recipe, batch_size=size)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    unit = embed(model, tokenizer, TEXTS, replace(recipe, normalize=True))
    torch.testing.assert_close(unit, want / want.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


def test_texts_are_cut_as_tokenizers_cut_them(tokenizer: HFTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    model = get_model("bert", max_expected_seq_len=9, **SHAPE)
    for limit, recipe in ((9, Recipe()), (6, Recipe(max_tokens=6)), (9, Recipe(max_tokens=100))):
        caplog.clear()
        rows = token_rows(model, tokenizer, TEXTS, recipe)
        tokenizer.backend.enable_truncation(limit)
        assert rows == [tokenizer.backend.encode(text).ids for text in TEXTS]
        tokenizer.backend.no_truncation()
        assert f"only the first {limit} tokens count of text " in caplog.text
        assert "2 (11 tokens)" in caplog.text
    caplog.clear()
    token_rows(model, tokenizer, TEXTS[:1], Recipe())
    assert not caplog.text


def test_prompts_case_and_edges(tokenizer: HFTokenizer) -> None:
    model = get_model("bert", max_expected_seq_len=32, **SHAPE)
    recipe = Recipe(prompts={"query": "a b "}, prompt="query", lowercase=True)
    assert token_rows(model, tokenizer, [" FOOD\n"], recipe) == [tokenizer.encode("a b food", add_special_tokens=True)]
    tokenizer.backend.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(ValueError, match=r"text 2 \(''\) has no tokens"):
        token_rows(model, tokenizer, ["food", " "], Recipe())


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_similarities(kind: str) -> None:
    v = torch.randn(3, 5)
    a, b = v[0], v[2]
    want = {
        "cosine": a @ b / (a.norm() * b.norm()),
        "dot": a @ b,
        "euclidean": -(a - b).norm(),
        "manhattan": -(a - b).abs().sum(),
    }[kind]
    table = SIMILARITIES[kind](v)
    torch.testing.assert_close(table[0, 2], want)
    torch.testing.assert_close(table, table.T)


def write(directory: Path, modules: Any, /, **files: Any) -> None:
    """modules.json of (kind, path), and further files by name, `pooling` that of the pooling."""
    listed = [{"idx": i, "name": str(i), "path": p, "type": f"a.models.{k}"} for i, (k, p) in enumerate(modules)]
    (directory / "modules.json").write_text(json.dumps(listed))
    if "pooling" in files:
        (directory / "1_Pooling").mkdir(exist_ok=True)
        files["1_Pooling/config"] = files.pop("pooling")
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


PLAIN = [("Transformer", ""), ("Pooling", "1_Pooling")]


@pytest.mark.parametrize(
    ("pooling", "want"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, ("cls",)),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, ("max",)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, ("lasttoken",)),
        ({"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_tokens": False}, ("weightedmean",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, ("lasttoken",)),
        ({"word_embedding_dimension": 8}, ("mean",)),
    ],
    ids=str,
)
def test_what_a_directory_says(pooling: dict, want: tuple, tmp_path: Path) -> None:
    write(tmp_path, PLAIN, pooling=pooling)
    assert read_recipe(tmp_path) == Recipe(pooling=want)
    assert recipe_files(tmp_path) == [Path("modules.json"), Path("1_Pooling/config.json")]


def test_everything_a_directory_says(tmp_path: Path) -> None:
    assert read_recipe(tmp_path) == Recipe(("mean",))
    more = {"prompts": {"query": "Query: ", "document": ""}, "default_prompt_name": "query"}
    write(
        tmp_path,
        [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")],
        pooling={"pooling_mode": "cls"},
        config_sentence_transformers=more | {"similarity_fn_name": "dot"},
    )
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "0_Transformer" / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 7, "do_lower_case": true}'
    )
    found = read_recipe(tmp_path)
    assert found == Recipe(("cls",), True, 7, True, more["prompts"], "query", "dot", "0_Transformer")


@pytest.mark.parametrize(
    ("modules", "files", "message"),
    [
        ([*PLAIN, ("Dense", "2_Dense")], {"pooling": {}}, r"a module 'Dense' is not supported, only Transformer"),
        ([("Pooling", "../1_Pooling")], {}, r"'../1_Pooling' of Pooling leads out of the directory"),
        (PLAIN, {"pooling": {"pooling_mode_new": True}}, r"pooling_mode_new is not known; known are pooling_mode_cls"),
        (PLAIN, {"pooling": {"pooling_mode": "men"}}, r"pooling 'men' is not known \(did you mean 'mean'\?\)"),
        (PLAIN, {"pooling": {"include_prompt": False}}, r"include_prompt=false is not supported"),
        (PLAIN, {"pooling": {}, "config_sentence_transformers": {"default_prompt_name": "q"}}, r"prompt 'q' is not kn"),
        (PLAIN, {"pooling": {}, "config_sentence_transformers": {"similarity_fn_name": "cos"}}, r"known are cosine, "),
        (PLAIN, {"modules": {"a": 1}}, r"modules.json is not a list of modules"),
    ],
)
def test_what_is_not_understood_is_refused(modules: list, files: dict, message: str, tmp_path: Path) -> None:
    write(tmp_path, modules, **files)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path)


SENTENCES = ["a man is eating food", "a man eats a meal", "a plane takes off"]


@pytest.mark.slow
@torch.no_grad()
def test_real_sentences(minilm: Path, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 as BERT, and as RoBERTa with the position table shifted, against transformers."""
    transformers = pytest.importorskip("transformers")
    recipe = read_recipe(minilm)
    assert recipe == Recipe(("mean",), normalize=True, max_tokens=256)
    tokenizer = get_tokenizer(minilm)
    sentences = [*SENTENCES, "word " * 300]
    encoded = transformers.AutoTokenizer.from_pretrained(minilm)(
        sentences, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    states = transformers.AutoModel.from_pretrained(minilm)(**encoded).last_hidden_state
    real = encoded["attention_mask"][..., None]
    want = F.normalize((states * real).sum(1) / real.sum(1))

    model = get_model(model_path=minilm)
    assert model.architecture == "bert_embedding"
    vectors = embed(model.eval(), tokenizer, sentences, recipe)
    torch.testing.assert_close(vectors, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(embed(freeze(model), tokenizer, sentences, recipe), want, atol=1e-5, rtol=0)

    tensors = load_file(minilm / "model.safetensors")
    table = "embeddings.position_embeddings.weight"
    tensors[table] = torch.cat((torch.zeros(2, 384), tensors[table]))
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((minilm / "config.json").read_text())
    config |= {"model_type": "roberta", "architectures": ["RobertaModel"], "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 514}))
    roberta = freeze(get_model(model_path=tmp_path))
    assert roberta.architecture == "roberta_embedding"
    torch.testing.assert_close(embed(roberta, tokenizer, sentences, recipe), want, atol=1e-5, rtol=0)

    alike = SIMILARITIES["cosine"](vectors)
    assert alike[0, 1] > 0.8
    assert alike[0, 2] < 0.2
