"""Mistral: LLaMA that sees through a sliding window (Jiang et al. 2023, arXiv 2310.06825)."""

from dataclasses import dataclass
from typing import Any

from fms.models.decoder import Decoder
from fms.models.llama import FMS, HF, llama_parts
from fms.models.registry import register_variants
from fms.utils.config import DecoderConfig
from fms.utils.serialization.config_hf import hf_map
from fms.utils.serialization.config_map import Field
from fms.utils.serialization.sources import register_source


@dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """The common vocabulary; a token sees the `sliding_window` last ones, itself included, or all (`None`)."""

    sliding_window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1, or None")


class Mistral(Decoder):
    """LLaMA's parts, seen through a window."""

    def __init__(self, config: MistralConfig | None = None, /, **overrides: Any):
        c = (config or _7B).updated(**overrides)
        super().__init__(c, **llama_parts(c, window=c.sliding_window))


_7B = MistralConfig(
    src_vocab_size=32_768,
    kvheads=8,
    hidden_dim=14_336,
    max_expected_seq_len=32_768,
    rope_theta=1_000_000.0,
)
VARIANTS = {
    "7b": _7B,
    "v0.1-7b": _7B.updated(src_vocab_size=32_000, rope_theta=10_000.0, sliding_window=4096),
}
register_variants("mistral", Mistral, VARIANTS)
WINDOW: Field = ("sliding_window", "sliding_window", lambda values: values.get("sliding_window", 4096))
register_source("mistral", "hf", HF, hf_map("mistral", "MistralForCausalLM", [WINDOW]))
register_source("mistral", "fms", FMS)
