"""How files of RoBERTa, BERT and their heads name weights and configuration."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fms.models.encoder import ClassificationConfig, EncoderConfig
from fms.utils.serialization.config_hf import HF_FIXED, hf_map
from fms.utils.serialization.config_map import REQUIRED, ConfigMap, Field, Values
from fms.utils.serialization.tables import Rule

ENCODER: list[Rule] = [
    ("embeddings.word_embeddings", "embedding"),
    ("embeddings.position_embeddings", "position_embedding"),
    ("embeddings.token_type_embeddings", "token_type_embedding"),
    ("embeddings.LayerNorm", "enc_norm"),
    ("embeddings.position_ids", None),  # counted by older versions
    ("encoder.layer.*.attention.self.query", "layers.*.attn.query"),
    ("encoder.layer.*.attention.self.key", "layers.*.attn.key"),
    ("encoder.layer.*.attention.self.value", "layers.*.attn.value"),
    ("encoder.layer.*.attention.output.dense", "layers.*.attn.dense"),
    ("encoder.layer.*.attention.output.LayerNorm", "layers.*.ln"),
    ("encoder.layer.*.intermediate.dense", "layers.*.ff.w1"),
    ("encoder.layer.*.output.dense", "layers.*.ff.w2"),
    ("encoder.layer.*.output.LayerNorm", "layers.*.ff_ln"),
]
POOLER: list[Rule] = [("pooler.dense", "pooler")]
NO_POOLER: list[Rule] = [("pooler.dense", None)]  # of a head that does without
SPAN: list[Rule] = [("qa_outputs", "head.out")]
FMS: list[Rule] = [
    ("base_model.embedding", "embedding"),
    ("base_model.token_type_embeddings", "token_type_embedding"),
    ("base_model.enc_norm", "enc_norm"),
    (
        "base_model.layers.*.attn.in_proj.qkv_fused",
        tuple(f"layers.*.attn.{n}" for n in ("query", "key", "value")),
        lambda c: [slice(i * c.emb_dim, (i + 1) * c.emb_dim) for i in range(3)],
    ),
    ("base_model.layers.*.attn.in_proj.query", "layers.*.attn.query"),
    ("base_model.layers.*.attn.in_proj.key", "layers.*.attn.key"),
    ("base_model.layers.*.attn.in_proj.value", "layers.*.attn.value"),
    ("base_model.layers.*.attn.dense", "layers.*.attn.dense"),
    ("base_model.layers.*.ln", "layers.*.ln"),
    ("base_model.layers.*.ff_sub_layer.w1", "layers.*.ff.w1"),
    ("base_model.layers.*.ff_sub_layer.w2", "layers.*.ff.w2"),
    ("base_model.layers.*.ff_ln", "layers.*.ff_ln"),
]
FMS_HEAD: list[Rule] = [
    ("classification_head.dense", "head.dense"),
    ("classification_head.ln", "head.ln"),
    ("classification_head.head", "head.out"),
]
FMS_SPAN: list[Rule] = [("qa_head", "head.out")]


def hf_rules(prefix: str, encoder: Sequence[Rule], head: Sequence[Rule] = ()) -> list[Rule]:
    """Names in transformers' files. The encoder's are written with `prefix`, and read without it or with either."""
    other = {"": ("bert.", "roberta.")}.get(prefix, ("",))
    rules = [*head]
    for start in (prefix, *other):
        rules += [(start + theirs, *rest) for theirs, *rest in encoder]
    for theirs, ours, *_ in list(rules):  # of files converted from TensorFlow
        if isinstance(ours, str) and theirs.lower().endswith(("layernorm", "layer_norm")):
            rules += [(f"{theirs}.gamma", f"{ours}.weight"), (f"{theirs}.beta", f"{ours}.bias")]
    return rules


def fields(pad_id: int) -> list[Field]:
    return [
        ("vocab_size", "src_vocab_size", REQUIRED),
        ("hidden_size", "emb_dim", REQUIRED),
        ("intermediate_size", "hidden_dim", REQUIRED),
        ("num_hidden_layers", "nlayers", REQUIRED),
        ("num_attention_heads", "nheads", REQUIRED),
        ("type_vocab_size", "type_vocab_size", 2),
        ("layer_norm_eps", "norm_eps", 1e-12),
        ("hidden_dropout_prob", "p_dropout", 0.1),
        ("attention_probs_dropout_prob", "attn_dropout", 0.1),
        ("tie_word_embeddings", "tie_heads", True),
        ("pad_token_id", "pad_id", pad_id),
    ]


def encoder_map(kind: str, classes: Sequence[str], pad_id: int) -> ConfigMap:
    """The map of `config.json`: of a family, by its `model_type` and the padding id that it has without saying so, and
    of the classes of transformers that have one head."""
    common = hf_map(
        kind,
        classes[0],
        base=fields(pad_id),
        activation=("hidden_act", "gelu"),
        rope=False,
        fixed={**HF_FIXED, "is_decoder": (False,), "position_embedding_type": ("absolute", None)},
        harmless=("gradient_checkpointing", "classifier_dropout", "directionality", "pooler_*"),
    )
    after_pad = kind == "roberta"

    def read_more(left: Values, ours: Values) -> Values:
        found = common.read_more(left, ours) | {"position_after_pad": after_pad}
        unused = found["pad_id"] + 1 if after_pad else 0  # rows of the position table before the first token's
        return found | {"max_expected_seq_len": left.pop("max_position_embeddings") - unused}

    def write_more(config: EncoderConfig) -> Values:
        rows = config.max_expected_seq_len + config.first_position
        return common.write_more(config) | {"max_position_embeddings": rows}

    return replace(common, read_more=read_more, write_more=write_more, classes=tuple(classes))


def classification_map(kind: str, classes: Sequence[str], pad_id: int) -> ConfigMap:
    """The same, with the classes and their names."""
    common = encoder_map(kind, classes, pad_id)

    def read_more(left: Values, ours: Values) -> Values:
        names = {int(i): name for i, name in (left.pop("id2label", None) or {}).items()}
        labels = [names[i] for i in sorted(names)]
        count = left.pop("num_labels", None) or len(labels) or 2
        named = labels != numbered(len(labels))
        dropout = left.pop("classifier_dropout", None)
        own = {"num_classes": count, "labels": tuple(labels) if named else (), "head_dropout": dropout}
        return common.read_more(left, ours) | own

    def write_more(config: ClassificationConfig) -> Values:
        labels = config.labels or numbered(config.num_classes)
        return common.write_more(config) | {
            "classifier_dropout": config.head_dropout,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }

    return replace(common, read_more=read_more, write_more=write_more)


def numbered(n: int) -> list[str]:
    """transformers' names of classes that have none."""
    return [f"LABEL_{i}" for i in range(n)]


def embedding_map(kind: str, classes: Sequence[str], pad_id: int) -> ConfigMap:
    """The same; some files hold a pooler, some do not, and the configuration does not say so."""

    def of_names(names: Iterable[str]) -> Values:
        return {"pooler": any(name.endswith("pooler.dense.weight") for name in names)}

    return replace(encoder_map(kind, classes, pad_id), of_names=of_names)
