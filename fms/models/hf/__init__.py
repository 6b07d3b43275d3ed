"""Models here as Hugging Face models: `to_hf_api(model)` works in `generate`, pipelines, `Trainer` and PEFT."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig

from fms.models import get_model
from fms.models.decoder import Decoder
from fms.models.hf.adapter import FMSForCausalLM, FMSModel, FMSPreTrainedModel
from fms.models.hf.config import FMSConfig, config_of
from fms.models.hf.encoders import FMSForMaskedLM, FMSForQuestionAnswering, FMSForSequenceClassification
from fms.utils.serialization.errors import nearest

__all__ = ["FMSConfig", "FMSForCausalLM", "FMSModel", "as_fms_model", "register_fms_models", "to_hf_api"]

ENCODERS = (FMSForMaskedLM, FMSForSequenceClassification, FMSForQuestionAnswering)
OVERRIDES = ("id2label", "label2id", "problem_type", "use_cache", "output_hidden_states", "name_or_path")
OWN = "of the model itself: get_model takes it, or resize_token_embeddings"


def register_fms_models() -> None:
    """Let `AutoConfig` and `AutoModel...` know these classes. Importing this package does it; again does no harm."""
    AutoConfig.register(FMSConfig.model_type, FMSConfig, exist_ok=True)
    for adapter in (FMSModel, FMSForCausalLM, *ENCODERS):
        auto = getattr(transformers, adapter.__name__.replace("FMS", "Auto" if adapter is FMSModel else "AutoModel"))
        auto.register(FMSConfig, adapter, exist_ok=True)


def to_hf_api(model: Any, **overrides: Any) -> FMSPreTrainedModel:
    """`model` as a Hugging Face model that shares its weights, in evaluation mode.

    A causal model gets `generate`; `.decoder` is the model, and `hf.decoder = torch.compile(hf.decoder)` compiles it.
    An encoder becomes what its head is for, `.encoder` likewise. `overrides` are of the configuration (id2label,
    label2id, problem_type, use_cache, output_hidden_states) or of how to generate (eos_token_id, max_new_tokens, ...).
    Raises `ValueError` for anything else, and for a model without an adapter.
    """
    defaults = dict(getattr(model, "generation_defaults", {}))
    if model.config.pad_id is not None:
        defaults.setdefault("pad_token_id", model.config.pad_id)
    known = GenerationConfig().to_dict()
    fields = {}
    for name, value in overrides.items():
        if name in OVERRIDES:
            fields[name] = value
        elif name in known:
            defaults[name] = value
        else:
            own = name in model.config.as_dict()
            hint = f" is {OWN}" if own else f" is not known{nearest(name, [*OVERRIDES, *known])}"
            raise ValueError(f"{name}={value!r}{hint}")
    adapter = adapter_for(model)
    hf = adapter(config_of(model, **fields, architectures=[adapter.__name__]), model)
    if isinstance(hf, FMSForCausalLM):
        hf.generation_config = GenerationConfig(**defaults)
    return hf.eval()


def adapter_for(model: Any) -> type[FMSPreTrainedModel]:
    if isinstance(model, Decoder):
        return FMSForCausalLM
    head = getattr(model, "head", None)
    if head is None and hasattr(model, "hidden"):
        return FMSModel
    for adapter in ENCODERS:
        if isinstance(head, adapter.head_class):
            return adapter
    what = f"there is no adapter for a {type(model).__name__} with {type(head).__name__}: it takes a Decoder, or an"
    raise ValueError(f"{what} Encoder with one of {', '.join(a.head_class.__name__ for a in ENCODERS)} or none")


def as_fms_model(
    model_id_or_path: str | Path,
    device_type: str = "cpu",
    data_type: str | torch.dtype | None = None,
    distributed_strategy: str | None = None,
    group: Any = None,
    initialize_model_with_weights: bool = True,
) -> Any:
    """The model of a Hugging Face directory or Hub id as one of ours, with its weights or with random ones."""
    name = "hf_pretrained" if initialize_model_with_weights else "hf_configured"
    return get_model(name, str(model_id_or_path), None, None, device_type, data_type, distributed_strategy, group)


register_fms_models()
