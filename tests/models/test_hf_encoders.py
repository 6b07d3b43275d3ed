"""Encoders as Hugging Face models against transformers' own, with the same weights."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fms.models import get_model

transformers = pytest.importorskip("transformers")

from fms.models.hf import to_hf_api  # noqa: E402
from tests import encoders  # noqa: E402
from tests.encoders import EIGHT, close, flat  # noqa: E402

ROOT = Path(__file__).parents[2]
AUTO = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Model": "AutoModel",
}


def twins(case: str, path: Path, **fields: Any) -> tuple[Any, Any]:
    theirs = encoders.reference(case, path, **fields)
    return theirs, to_hf_api(get_model(model_path=path))


@pytest.mark.parametrize("case", EIGHT)
@torch.no_grad()
def test_outputs(case: str, tmp_path: Path) -> None:
    theirs, hf = twins(case, tmp_path)
    ids, mask, types = encoders.inputs(hf.encoder)
    there = slice(None) if "Classification" in case else (..., mask.bool())
    if "Masked" in case or case.endswith("Model"):
        there = mask.bool()
    given = {"attention_mask": mask, "token_type_ids": types}
    want = theirs(ids, **given, output_hidden_states=True)
    got = hf(ids, **given, output_hidden_states=True)
    close(flat(got)[there], flat(want)[there])
    assert len(got.hidden_states) == len(want.hidden_states)
    for ours, reference in zip(got.hidden_states, want.hidden_states, strict=True):
        close(ours[mask.bool()], reference[mask.bool()])
    hf.encoder = torch.compile(hf.encoder, backend="eager")
    close(flat(hf(ids, **given))[there], flat(want)[there])

    hf.save_pretrained(tmp_path / "saved")
    again = getattr(transformers, AUTO[encoders.CASES[case][1]]).from_pretrained(tmp_path / "saved")
    assert type(again) is type(hf)
    close(flat(again(ids, **given))[there], flat(want)[there])


@pytest.mark.parametrize("case", [*EIGHT[:3], "bert, one class", "roberta, five classes", "bert, untied"])
def test_losses(case: str, tmp_path: Path) -> None:
    theirs, hf = twins(case, tmp_path)
    ids, mask, _ = encoders.inputs(hf.encoder)
    if "Question" in case:
        places = torch.randint(5, (2, 3))
        labels: dict[str, Any] = {"start_positions": places[0], "end_positions": places[1] + 2}
    elif hasattr(hf.encoder.config, "num_classes"):
        classes = hf.encoder.config.num_classes
        labels = {"labels": torch.rand(3) if classes == 1 else torch.randint(classes, (3,))}
    else:
        labels = {"labels": ids.masked_fill(mask == 0, -100)}
    want, got = (model(ids, attention_mask=mask, **labels).loss for model in (theirs, hf))
    close(got, want)
    got.backward()
    assert all(p.grad is not None for p in hf.parameters())


@torch.no_grad()
def test_another_vocabulary(tmp_path: Path) -> None:
    _, hf = twins("RobertaForMaskedLM", tmp_path)
    ids = torch.randint(8, 60, (1, 6))
    before = hf(ids).logits
    hf.resize_token_embeddings(70)
    after = hf(ids).logits
    assert after.shape[-1] == 70
    close(after[..., :61], before)
    assert hf.encoder.head.out.weight is hf.encoder.embedding.weight


def test_another_head_than_the_model_has(tmp_path: Path) -> None:
    _, hf = twins("BertForMaskedLM", tmp_path)
    hf.save_pretrained(tmp_path / "saved")
    for name, words in {
        "AutoModelForQuestionAnswering": "needs a SpanHead, and bert has a MaskedLMHead",
        "AutoModelForCausalLM": "needs a causal model, and bert is not one",
    }.items():
        with pytest.raises(ValueError, match=words):
            getattr(transformers, name).from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="25 tokens are more than the max_expected_seq_len=24"):
        hf(torch.zeros(1, 25, dtype=torch.long))


WORDS = ["what", "where", "is", "the", "capital", "of", "france", "paris", "a", "city", "in", "good", "bad", "?", "."]


def tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{name}_token": word for name, word in names.items()}
    )
    fast.save_pretrained(path)
    return fast


def test_pipelines(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)
    text = ["the capital of france is [MASK] .", "a good [MASK]"]
    for case, task in {
        "BertForMaskedLM": "fill-mask",
        "bert, named classes": "text-classification",
        "BertModel": "feature-extraction",
    }.items():
        found = [transformers.pipeline(task, model=model, tokenizer=words)(text) for model in twins(case, tmp_path)]
        close(*(torch.tensor(numbers(rows)) for rows in found))
        assert numbers(found[0])


def numbers(values: Any) -> list[float]:
    if isinstance(values, dict):
        return numbers([values["score"]])
    return [x for value in values for x in numbers(value)] if isinstance(values, list) else [values]


def test_the_answer_of_the_example(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tokenizer(tmp_path)
    encoders.reference("BertForQuestionAnswering", tmp_path)
    example = ROOT / "examples" / "question_answering.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(tmp_path), "where is paris ?", "paris is in france ."])
    capsys.readouterr()
    runpy.run_path(str(example), run_name="__main__")
    found = capsys.readouterr().out.splitlines()[-1]
    assert found
    assert found in "paris is in france ."
