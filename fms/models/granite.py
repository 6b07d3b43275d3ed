"""Granite 3: LLaMA with four multipliers (IBM Granite team 2024)."""

from dataclasses import dataclass
from typing import Any

from fms.models.decoder import Decoder
from fms.models.llama import FMS, GGUF, HF, llama_parts
from fms.models.registry import register_variants
from fms.utils.config import DecoderConfig
from fms.utils.serialization.config_gguf import gguf_map
from fms.utils.serialization.config_hf import hf_map
from fms.utils.serialization.config_map import Field
from fms.utils.serialization.sources import register_source


@dataclass(frozen=True)
class GraniteConfig(DecoderConfig):
    """The common vocabulary, and what multiplies embeddings, residual branches and scores, and divides logits."""

    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0


def granite_parts(c: GraniteConfig, **more: Any) -> dict[str, Any]:
    """LLaMA's parts, scaled; `more` as for `llama_parts`."""
    return llama_parts(
        c,
        attention_scale=c.attention_multiplier,
        residual_scale=c.residual_multiplier,
        embedding_multiplier=c.embedding_multiplier,
        logits_scaling=c.logits_scaling,
        **more,
    )


class Granite(Decoder):
    """The scaled parts as they are."""

    def __init__(self, config: GraniteConfig | None = None, /, **overrides: Any):
        c = (config or _8B).updated(**overrides)
        super().__init__(c, **granite_parts(c))


_8B = GraniteConfig(
    src_vocab_size=49_155,
    kvheads=8,
    nlayers=40,
    hidden_dim=12_800,
    max_expected_seq_len=8192,
    tie_heads=True,
    pad_id=0,
    embedding_multiplier=12.0,
    logits_scaling=16.0,
    residual_multiplier=0.22,
    attention_multiplier=0.0078125,
)
VARIANTS = {
    "8b": _8B,
    "3_1_2b": _8B.updated(
        emb_dim=2048,
        head_dim=64,
        hidden_dim=8192,
        max_expected_seq_len=131_072,
        rope_theta=5_000_000.0,
        logits_scaling=8.0,
        attention_multiplier=0.015625,
    ),
}
register_variants("granite", Granite, VARIANTS)

MULTIPLIERS: list[Field] = [
    (name, name, 1.0)
    for name in ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
]
GGUF_MULTIPLIERS: list[Field] = [
    ("embedding_scale", "embedding_multiplier", 1.0),
    ("logit_scale", "logits_scaling", 1.0),
    ("residual_scale", "residual_multiplier", 1.0),
    ("attention.scale", "attention_multiplier", 1.0),
]
register_source("granite", "hf", HF, hf_map("granite", "GraniteForCausalLM", MULTIPLIERS))
register_source("granite", "gguf", GGUF, gguf_map("granite", GGUF_MULTIPLIERS))
register_source("granite", "fms", FMS)
