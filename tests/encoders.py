"""Tiny random BERT and RoBERTa models of transformers, saved by its `save_pretrained`, and ours of the same file.

Weights have a standard deviation of 0.2, so that a missing bias, token type or mask shows in the first digit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fms.models import freeze, get_model
from fms.models.encoder import Encoder

transformers = pytest.importorskip("transformers")

LENGTH, STD = 14, 0.2
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "attn_implementation": "eager",
}
HEADS = {
    "ForMaskedLM": "",
    "ForSequenceClassification": "_classification",
    "ForQuestionAnswering": "_question_answering",
    "Model": "_embedding",
}
MLM, CLASSES = "ForMaskedLM", "ForSequenceClassification"
CASES: dict[str, tuple[str, str, dict]] = {
    f"{family}{head}": (family, head, {}) for family in ("Bert", "Roberta") for head in HEADS
}
EIGHT = tuple(CASES)
CASES |= {
    "bert, untied": ("Bert", MLM, {"tie_word_embeddings": False}),
    "roberta, untied": ("Roberta", MLM, {"tie_word_embeddings": False}),
    "bert, gelu_new": ("Bert", MLM, {"hidden_act": "gelu_new"}),
    "roberta, relu": ("Roberta", MLM, {"hidden_act": "relu"}),
    "bert, pad_token_id": ("Bert", MLM, {"pad_token_id": 7}),
    "roberta, pad_token_id": ("Roberta", "Model", {"pad_token_id": 5}),
    "bert, larger eps": ("Bert", "Model", {"layer_norm_eps": 0.1}),
    "bert, one class": ("Bert", CLASSES, {"num_labels": 1}),
    "roberta, five classes": ("Roberta", CLASSES, {"num_labels": 5, "classifier_dropout": 0.3}),
    "bert, named classes": ("Bert", CLASSES, {"id2label": {0: "good", 1: "bad", 2: "neither"}}),
    "bert, three token types": ("Bert", MLM, {"type_vocab_size": 3}),
}


def reference(case: str, path: Path, **more: Any) -> torch.nn.Module:
    """transformers' model of a case, random, also saved at `path`."""
    family, head, fields = CASES[case]
    config = getattr(transformers, f"{family}Config")(**(COMMON | fields | more))
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name.lower() and "weight" in name else 0.0, STD)
    model.save_pretrained(path)
    return model


def pair(case: str, frozen: bool, path: Path) -> tuple[torch.nn.Module, Encoder]:
    theirs = reference(case, path)
    ours = get_model(model_path=path).eval()
    return theirs, freeze(ours) if frozen else ours


def inputs(model: Encoder, rows: int = 3, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, of which the later rows end in padding, the mask that says so, and token types."""
    c = model.config
    ids = torch.randint(8, c.src_vocab_size, (rows, length))
    mask = torch.arange(length) < length - 3 * torch.arange(rows)[:, None]
    return ids.masked_fill(~mask, c.pad_id), mask.long(), torch.randint(c.type_vocab_size, (rows, length))


def flat(output: Any) -> Tensor:
    """One tensor of what either library's model gives."""
    if isinstance(output, tuple):
        return torch.stack(output)
    if not hasattr(output, "keys"):
        return output
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits))
    return output.logits if "logits" in output else output.last_hidden_state


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
