"""BERT (arXiv 1810.04805): variants, heads, weight tables."""

from functools import partial
from typing import Any

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
from fms.models.registry import register_model, register_variants
from fms.utils.serialization.sources import register_source
from fms.utils.serialization.tables import Rule, twin

_UNLIKE_ROBERTA: dict[str, Any] = {
    "src_vocab_size": 30_522,
    "norm_eps": 1e-12,
    "type_vocab_size": 2,
    "pad_id": 0,
    "position_after_pad": False,
}
VARIANTS = {"base": EncoderConfig(**_UNLIKE_ROBERTA)}
register_variants("bert", masked_lm, VARIANTS)
register_model("bert_classification", "base", partial(classifier, ClassificationConfig(**_UNLIKE_ROBERTA), False))
register_model("bert_question_answering", "base", partial(question_answering, VARIANTS["base"]))
register_model("bert_embedding", "base", partial(embedding_model, EmbeddingConfig(**_UNLIKE_ROBERTA)))

MASKED_LM: list[Rule] = [
    ("cls.predictions.transform.dense", "head.dense"),
    ("cls.predictions.transform.LayerNorm", "head.ln"),
    ("cls.predictions.decoder", "head.out"),
    ("cls.predictions.bias", "head.out.bias", twin),
    ("cls.seq_relationship", None),  # of pre-training
]
CLASSIFICATION: list[Rule] = [("classifier", "head.out"), ("bert.pooler.dense", "head.dense")]
BODY = [*ENCODER, *NO_POOLER]
FMS_BODY: list[Rule] = [*FMS, ("base_model.position_embedding", "position_embedding")]


def classes(*names: str) -> tuple[str, list[str], int]:
    return "bert", [f"Bert{name}" for name in names], 0


register_source(
    "bert", "hf", hf_rules("bert.", BODY, MASKED_LM), encoder_map(*classes("ForMaskedLM", "ForPreTraining"))
)
register_source("bert", "fms", [*FMS_BODY, *FMS_HEAD])
register_source(
    "bert_classification",
    "hf",
    hf_rules("bert.", ENCODER, CLASSIFICATION),
    classification_map(*classes("ForSequenceClassification")),
)
register_source("bert_classification", "fms", [*FMS_BODY, *FMS_HEAD])
register_source(
    "bert_question_answering",
    "hf",
    hf_rules("bert.", BODY, SPAN),
    encoder_map(*classes("ForQuestionAnswering")),
)
register_source("bert_question_answering", "fms", [*FMS_BODY, *FMS_SPAN])
register_source("bert_embedding", "hf", hf_rules("", [*ENCODER, *POOLER]), embedding_map(*classes("Model")))
