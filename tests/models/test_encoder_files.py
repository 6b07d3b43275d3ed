"""Files of RoBERTa and BERT: written and read back, of older versions, of other heads, of the existing FMS."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fms.models import freeze, get_model
from fms.models.convert import convert, save_model
from fms.models.encoder import Encoder
from fms.utils.serialization.errors import CheckpointError
from tests.encoders import CASES, CLASSES, EIGHT, MLM, close, flat, inputs, pair, reference, transformers


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_export_is_bit_for_bit_and_transformers_reads_it(case: str, tmp_path: Path) -> None:
    theirs, ours = pair(case, False, tmp_path / "hf")
    save_model(freeze(ours), tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back", "hf")
    first, last = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "back"))
    family, head, _ = CASES[case]
    twins = {"cls.predictions.decoder.bias", "lm_head.decoder.bias", "cls.predictions.bias", "lm_head.bias"}
    assert {k for k in first if k not in twins} == {k for k in last if k not in twins}
    for name, tensor in first.items():
        if name not in twins:
            assert torch.equal(tensor, last[name]), name
    loaded, report = getattr(transformers, f"{family}{head}").from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids, mask, types = inputs(ours)
    args = {"attention_mask": mask, "token_type_ids": types}
    torch.testing.assert_close(flat(loaded.eval()(ids, **args)), flat(theirs(ids, **args)), rtol=0, atol=1e-6)
    for name in ("hidden_dropout_prob", "classifier_dropout", "id2label", "pad_token_id", "type_vocab_size"):
        assert getattr(loaded.config, name) == getattr(theirs.config, name)
    again = get_model(model_path=tmp_path / "back")
    assert again.config == ours.config
    assert again.architecture == ours.architecture


def edit(path: Path, **changes: Any) -> None:
    """Fields of config.json; `None` takes one away."""
    file = path / "config.json"
    fields = {name: value for name, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    file.write_text(json.dumps(fields))


def rename(path: Path, *pairs: tuple[str, str], **more: Tensor) -> None:
    """Parts of tensors' names; `more` are further tensors, with _ for a dot."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for old, new in pairs:
        assert any(old in name for name in tensors)
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors | more, file)


def test_what_a_directory_is_taken_for(tmp_path: Path) -> None:
    reference("BertForMaskedLM", tmp_path)
    edit(tmp_path, architectures=None)
    assert get_model(model_path=tmp_path).architecture == "bert"
    edit(tmp_path, architectures=["BertForTokenClassification"])
    with pytest.raises(CheckpointError, match=r"'BertForTokenClassification' is not one .* bert, BertForMaskedLM, "):
        get_model(model_path=tmp_path)
    assert get_model("bert", model_path=tmp_path).architecture == "bert"
    edit(tmp_path, architectures=["BertForMaskedLM"])
    with pytest.raises(CheckpointError, match=r"holds 'bert', not 'roberta'"):
        get_model("roberta", model_path=tmp_path)


@pytest.mark.parametrize("change", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}], ids=str)
def test_what_changes_the_result_is_refused(change: dict, tmp_path: Path) -> None:
    reference("BertForMaskedLM", tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(CheckpointError, match=f"{next(iter(change))}=.* is not supported"):
        get_model(model_path=tmp_path)


@pytest.mark.parametrize("case", ["BertForMaskedLM", "RobertaForMaskedLM"])
@torch.no_grad()
def test_files_of_older_versions(case: str, tmp_path: Path) -> None:
    """Converted from TensorFlow, with the tensors of pre-training, counted positions, both names of the bias."""
    theirs = reference(case, tmp_path)
    family = case.split("For")[0].lower()
    bias = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}[family]
    rename(
        tmp_path,
        ("LayerNorm.weight", "LayerNorm.gamma"),
        ("LayerNorm.bias", "LayerNorm.beta"),
        **{
            f"{family}.embeddings.position_ids": torch.arange(24)[None],
            f"{family}.pooler.dense.weight": torch.ones(32, 32),
            f"{family}.pooler.dense.bias": torch.ones(32),
            bias.replace("bias", "decoder.bias"): load_file(tmp_path / "model.safetensors")[bias],
        },
    )
    if family == "bert":
        rename(
            tmp_path, **{"cls.seq_relationship.weight": torch.ones(2, 32), "cls.seq_relationship.bias": torch.ones(2)}
        )
        edit(tmp_path, architectures=["BertForPreTraining"])
    edit(tmp_path, tie_word_embeddings=None, position_embedding_type="absolute", gradient_checkpointing=False)
    ours = get_model(model_path=tmp_path).eval()
    ids, mask, types = inputs(ours)
    args = {"token_type_ids": types}
    close(ours(ids, mask=mask, **args), theirs(ids, attention_mask=mask, **args).logits)


@pytest.mark.parametrize("case", ["BertModel", "RobertaModel"])
@torch.no_grad()
def test_bare_files_with_a_prefix_or_without_a_pooler(case: str, tmp_path: Path) -> None:
    theirs = reference(case, tmp_path)
    family = case.removesuffix("Model").lower()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {f"{family}.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    ours = get_model(model_path=tmp_path).eval()
    ids, mask, _ = inputs(ours)
    want = theirs(ids, attention_mask=mask)
    close(ours(ids, mask=mask), want.last_hidden_state)
    close(ours.pooler(ours(ids, mask=mask)), want.pooler_output)

    save_file({n: t for n, t in tensors.items() if "pooler" not in n}, tmp_path / "model.safetensors")
    bare = get_model(model_path=tmp_path).eval()
    assert bare.pooler is None
    close(bare(ids, mask=mask), want.last_hidden_state)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@torch.no_grad()
def test_a_new_head_on_a_masked_lm(family: str, tmp_path: Path) -> None:
    theirs = reference(f"{family}ForMaskedLM", tmp_path)
    architecture = f"{family.lower()}_classification"
    with pytest.raises(CheckpointError, match=r"nothing in the checkpoint fills it"):
        get_model(architecture, model_path=tmp_path)
    ours = get_model(architecture, model_path=tmp_path, strict=False, num_classes=3, labels=("a", "b", "c")).eval()
    ids, mask, _ = inputs(ours)
    close(ours.hidden(ids, mask=mask), theirs.base_model(ids, attention_mask=mask).last_hidden_state)
    assert ours(ids, mask=mask).shape == (3, 3)
    assert ours.head.out.weight.std() > 0.01


@pytest.mark.parametrize("case", [case for case in EIGHT if not case.endswith("Model")])
@torch.no_grad()
def test_files_of_the_existing_fms(case: str, tmp_path: Path) -> None:
    """Written by its names, where RoBERTa has no rows for the positions of padding, and read back, fused too."""
    _, ours = pair(case, False, tmp_path / "hf")
    save_model(ours, tmp_path / "fms", "fms")
    tensors = load_file(tmp_path / "fms" / "model.safetensors")
    first = ours.config.first_position
    assert torch.equal(tensors["base_model.position_embedding.weight"], ours.position_embedding.weight[first:])
    tied = "classification_head.head.weight" in tensors and case.endswith(MLM)
    assert not tied or torch.equal(tensors["classification_head.head.weight"], ours.embedding.weight)
    for i in range(2):
        attn = f"base_model.layers.{i}.attn.in_proj"
        for kind in ("weight", "bias"):
            if f"{attn}.qkv_fused.{kind}" in tensors:
                parts = tensors.pop(f"{attn}.qkv_fused.{kind}").chunk(3)
                tensors |= {f"{attn}.{n}.{kind}": p for n, p in zip(("query", "key", "value"), parts, strict=True)}
    (tmp_path / "unfused").mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "unfused" / "model.safetensors")
    ids, mask, types = inputs(ours)
    real = ... if case.endswith(CLASSES) else mask.bool()  # what comes of padding is not compared

    def result(model: Encoder) -> Tensor:
        output = model(ids, mask=mask, token_type_ids=types)
        return torch.stack(output, -1)[real] if isinstance(output, tuple) else output[real]

    for name in ("fms", "unfused"):
        again = get_model(ours.architecture, "base", tmp_path / name, **ours.config.as_dict()).eval()
        assert torch.equal(again.position_embedding.weight[first:], ours.position_embedding.weight[first:])
        assert not again.position_embedding.weight[:first].any()
        close(result(again), result(ours))
