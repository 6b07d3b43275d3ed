"""Qwen3: LLaMA whose query and key heads are normalised (Qwen team 2025, arXiv 2505.09388)."""

from dataclasses import dataclass
from typing import Any

from fms.models.decoder import Decoder
from fms.models.llama import FMS_UNFUSED, HF, llama_parts
from fms.models.registry import register_variants
from fms.utils.config import DecoderConfig
from fms.utils.serialization.config_hf import HF_FIXED, hf_map
from fms.utils.serialization.sources import register_source
from fms.utils.serialization.tables import Rule, neighbours_to_halves


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """The common vocabulary; `head_dim` is a number of its own, not emb_dim / nheads."""


class Qwen3(Decoder):
    """LLaMA's parts and a norm of each query and key head."""

    def __init__(self, config: Qwen3Config | None = None, /, **overrides: Any):
        c = (config or VARIANTS["0.6b"]).updated(**overrides)
        super().__init__(c, **llama_parts(c, qk_norm=True))


_BASE = Qwen3Config(
    src_vocab_size=151_936,
    kvheads=8,
    norm_eps=1e-6,
    max_expected_seq_len=40_960,
    rope_theta=1_000_000.0,
)
VARIANTS = {
    "0.6b": _BASE.updated(emb_dim=1024, nheads=16, nlayers=28, hidden_dim=3072, tie_heads=True),
    "embedding-0.6b": _BASE.updated(
        src_vocab_size=151_669,
        emb_dim=1024,
        nheads=16,
        nlayers=28,
        hidden_dim=3072,
        max_expected_seq_len=32_768,
        tie_heads=True,
    ),
    "1.7b": _BASE.updated(emb_dim=2048, nheads=16, nlayers=28, hidden_dim=6144, tie_heads=True),
    "4b": _BASE.updated(emb_dim=2560, nheads=32, nlayers=36, hidden_dim=9728, tie_heads=True),
    "8b": _BASE.updated(emb_dim=4096, nheads=32, nlayers=36, hidden_dim=12_288),
}
register_variants("qwen3", Qwen3, VARIANTS)

NORMS: list[Rule] = [
    ("model.layers.*.self_attn.q_norm", "layers.*.attn.q_norm"),
    ("model.layers.*.self_attn.k_norm", "layers.*.attn.k_norm"),
]
BARE: list[Rule] = [(rule[0].removeprefix("model."), *rule[1:]) for rule in HF + NORMS]  # of embedding models


def halves(c: Qwen3Config) -> list:
    return [neighbours_to_halves(1, c.head_dim)]


FMS_NORMS: list[Rule] = [
    ("base_model.layers.*.attn.in_proj.q_norm", "layers.*.attn.q_norm", halves),
    ("base_model.layers.*.attn.in_proj.k_norm", "layers.*.attn.k_norm", halves),
]
FIXED = {**HF_FIXED, "use_sliding_window": (False,), "sliding_window": (None,)}
MAP = hf_map("qwen3", "Qwen3ForCausalLM", fixed=FIXED, harmless=("max_window_layers", "layer_types"))
register_source("qwen3", "hf", [*HF, *NORMS, *BARE], MAP)
register_source("qwen3", "fms", [*FMS_UNFUSED, *FMS_NORMS])
