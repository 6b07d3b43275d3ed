"""RoBERTa (arXiv 1907.11692): variants, heads, weight tables."""

from collections.abc import Sequence
from functools import partial

import torch

from fms.models.encoder import (
    ClassificationConfig,
    EmbeddingConfig,
    EncoderConfig,
    classifier,
    embedding_model,
    masked_lm,
    question_answering,
)
from fms.models.encoder_tables import (
    ENCODER,
    FMS,
    FMS_HEAD,
    FMS_SPAN,
    NO_POOLER,
    POOLER,
    SPAN,
    classification_map,
    embedding_map,
    encoder_map,
    hf_rules,
)
from fms.models.registry import register_model
from fms.utils.serialization.sources import register_source
from fms.utils.serialization.tables import Index, Rule, twin

_BASE = EncoderConfig()
VARIANTS = {
    "base": _BASE,
    "micro": _BASE.updated(
        src_vocab_size=256,
        emb_dim=192,
        nheads=4,
        nlayers=5,
        hidden_dim=768,
        max_expected_seq_len=1024,
        norm_eps=1e-12,
        tie_heads=False,
    ),
}
for _name, _config in VARIANTS.items():
    register_model("roberta", _name, partial(masked_lm, _config, "gelu"))  # whatever the blocks' activation is
register_model("roberta_classification", "base", partial(classifier, ClassificationConfig(), True))
register_model("roberta_question_answering", "base", partial(question_answering, _BASE))
register_model("roberta_embedding", "base", partial(embedding_model, EmbeddingConfig()))

MASKED_LM: list[Rule] = [
    ("lm_head.dense", "head.dense"),
    ("lm_head.layer_norm", "head.ln"),
    ("lm_head.decoder", "head.out"),
    ("lm_head.bias", "head.out.bias", twin),
]
CLASSIFICATION: list[Rule] = [("classifier.dense", "head.dense"), ("classifier.out_proj", "head.out")]


def behind_padding(c: EncoderConfig) -> Sequence[Index]:
    """The existing FMS keeps the rows of real tokens only; what it adds to padding is nothing."""
    return [torch.arange(-c.first_position, c.max_expected_seq_len).clamp(min=-1)]


FMS_POSITIONS: list[Rule] = [("base_model.position_embedding", "position_embedding", behind_padding)]
BODY = [*ENCODER, *NO_POOLER]
FMS_BODY = [*FMS, *FMS_POSITIONS]


def classes(*names: str) -> tuple[str, list[str], int]:
    return "roberta", [f"Roberta{name}" for name in names], 1


register_source("roberta", "hf", hf_rules("roberta.", BODY, MASKED_LM), encoder_map(*classes("ForMaskedLM")))
register_source("roberta", "fms", [*FMS_BODY, *FMS_HEAD])
register_source(
    "roberta_classification",
    "hf",
    hf_rules("roberta.", BODY, CLASSIFICATION),
    classification_map(*classes("ForSequenceClassification")),
)
register_source("roberta_classification", "fms", [*FMS_BODY, *FMS_HEAD])
register_source(
    "roberta_question_answering",
    "hf",
    hf_rules("roberta.", BODY, SPAN),
    encoder_map(*classes("ForQuestionAnswering")),
)
register_source("roberta_question_answering", "fms", [*FMS_BODY, *FMS_SPAN])
register_source("roberta_embedding", "hf", hf_rules("", [*ENCODER, *POOLER]), embedding_map(*classes("Model")))
