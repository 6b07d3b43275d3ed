"""The configuration of a model here as Hugging Face's classes want it: ours in a dict, under their names as well."""

from typing import Any

from transformers import PretrainedConfig

from fms.models.registry import build, list_variants


def theirs(name: str) -> Any:
    """An attribute that reads and writes the field `name` of our configuration; `None` where a family lacks it."""

    def read(config: "FMSConfig") -> Any:
        return (config.fms or {}).get(name)

    def write(config: "FMSConfig", value: Any) -> None:
        config.fms = (config.fms or {}) | {name: value}

    return property(read, write)


class FMSConfig(PretrainedConfig):
    """`architecture` as `list_models` names it, and in `fms` every field of that family's configuration."""

    model_type = "fms"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds a list)

    architecture: str | None = None
    fms: dict[str, Any] | None = None
    sliding_window: int | None = None  # of attention, in tokens
    use_cache: bool = True

    vocab_size = theirs("src_vocab_size")
    hidden_size = theirs("emb_dim")
    intermediate_size = theirs("hidden_dim")
    num_hidden_layers = theirs("nlayers")
    num_attention_heads = theirs("nheads")
    num_key_value_heads = theirs("kvheads")
    head_dim = theirs("head_dim")
    max_position_embeddings = theirs("max_expected_seq_len")
    tie_word_embeddings = theirs("tie_heads")
    pad_token_id = theirs("pad_id")

    def build(self) -> Any:
        """The model that this describes, on the current default device. Raises `ValueError` if it names none."""
        if self.architecture is None or self.fms is None:
            raise ValueError("this configuration describes no model: get one with to_hf_api or from_pretrained")
        return build(self.architecture, list_variants(self.architecture)[0], self.fms)


def config_of(model: Any, **fields: Any) -> FMSConfig:
    """The same of a model that is there already."""
    fields = {"sliding_window": getattr(model, "window", None), "dtype": model.embedding.weight.dtype} | fields
    labels = getattr(model.config, "labels", ())
    if classes := getattr(model.config, "num_classes", None):
        fields = {"id2label": dict(enumerate(labels or (f"LABEL_{i}" for i in range(classes))))} | fields
        fields = {"label2id": {name: i for i, name in fields["id2label"].items()}} | fields
    return FMSConfig(architecture=model.architecture, fms=model.config.as_dict(), **fields)
