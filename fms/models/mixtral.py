"""Mixtral: Mistral with a mixture of experts in each block (Jiang et al. 2024, arXiv 2401.04088)."""

from dataclasses import dataclass, replace
from typing import Any

from fms.models.decoder import Decoder
from fms.models.llama import FMS, HF, META, llama_parts
from fms.models.mistral import MistralConfig
from fms.models.registry import register_variants
from fms.modules.moe import MixtureOfExperts
from fms.utils.serialization.config_hf import HF_DECODER, HF_FIXED, hf_map
from fms.utils.serialization.config_map import Field, Values
from fms.utils.serialization.sources import register_source
from fms.utils.serialization.tables import Rows, Rule, Taken


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """Mistral's; a token goes through `top_k_experts` of the `num_experts` experts, each `hidden_dim` wide."""

    num_experts: int = 8
    top_k_experts: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k_experts <= self.num_experts:
            raise ValueError(f"top_k_experts={self.top_k_experts} must lie in 1..num_experts={self.num_experts}")
        if self.attn_bias or self.mlp_bias:
            raise ValueError(f"attn_bias={self.attn_bias}, mlp_bias={self.mlp_bias}: Mixtral has no biases")


class Mixtral(Decoder):
    """LLaMA's parts, with experts."""

    def __init__(self, config: MixtralConfig | None = None, /, **overrides: Any):
        c = (config or _8X7B).updated(**overrides)

        def experts() -> MixtureOfExperts:
            return MixtureOfExperts(c.emb_dim, c.hidden_dim, c.num_experts, c.top_k_experts, c.activation_fn)

        super().__init__(c, **llama_parts(c, window=c.sliding_window, feed_forward=experts))


_8X7B = MixtralConfig(kvheads=8, hidden_dim=14_336, max_expected_seq_len=32_768, rope_theta=1_000_000.0)
VARIANTS = {"8x7b": _8X7B}
register_variants("mixtral", Mixtral, VARIANTS)


def stacked_gate_up(hidden_dim: int) -> list[Taken]:
    """Gate and up of each expert, one behind the other in a tensor (experts, 2 hidden_dim, emb_dim)."""
    return [Rows(slice(0, hidden_dim), dim=1), Rows(slice(hidden_dim, 2 * hidden_dim), dim=1)]


def gate_up(c: MixtralConfig) -> list[Taken]:
    return stacked_gate_up(c.hidden_dim)


def experts_in_a_row(c: MixtralConfig, turned: bool = False) -> list[Taken]:
    """Experts one behind the other in a tensor (experts * hidden_dim, emb_dim)."""
    return [[Rows(slice(i * c.hidden_dim, (i + 1) * c.hidden_dim), turned=turned) for i in range(c.num_experts)]]


def turned_experts_in_a_row(c: MixtralConfig) -> list[Taken]:
    return experts_in_a_row(c, turned=True)


GATE_UP = ("layers.*.ff.experts.wg", "layers.*.ff.experts.w1")
REST_OF_HF: list[Rule] = [rule for rule in HF if ".mlp." not in rule[0]]
EXPERTS: list[Rule] = [
    ("model.layers.*.block_sparse_moe.gate", "layers.*.ff.gate"),
    ("model.layers.*.block_sparse_moe.experts.*.w1.weight", "layers.*.ff.experts.wg"),
    ("model.layers.*.block_sparse_moe.experts.*.w3.weight", "layers.*.ff.experts.w1"),
    ("model.layers.*.block_sparse_moe.experts.*.w2.weight", "layers.*.ff.experts.w2"),
    # as transformers 5 has them in memory
    ("model.layers.*.mlp.gate", "layers.*.ff.gate"),
    ("model.layers.*.mlp.experts.gate_up_proj", GATE_UP, gate_up),
    ("model.layers.*.mlp.experts.down_proj", "layers.*.ff.experts.w2"),
]
MISTRAL: list[Rule] = [
    *(rule for rule in META if ".feed_forward." not in rule[0]),
    ("layers.*.block_sparse_moe.gate", "layers.*.ff.gate"),
    ("layers.*.block_sparse_moe.w1", "layers.*.ff.experts.wg", experts_in_a_row),
    ("layers.*.block_sparse_moe.w3", "layers.*.ff.experts.w1", experts_in_a_row),
    ("layers.*.block_sparse_moe.w2", "layers.*.ff.experts.w2", turned_experts_in_a_row),
    # the later releases
    ("layers.*.feed_forward.gate", "layers.*.ff.gate"),
    ("layers.*.feed_forward.experts.*.w1.weight", "layers.*.ff.experts.wg"),
    ("layers.*.feed_forward.experts.*.w3.weight", "layers.*.ff.experts.w1"),
    ("layers.*.feed_forward.experts.*.w2.weight", "layers.*.ff.experts.w2"),
]
FMS_EXPERTS: list[Rule] = [
    ("base_model.layers.*.ff_sub_layer.gate", "layers.*.ff.gate"),
    ("base_model.layers.*.ff_sub_layer.cond_ffn.w13", GATE_UP, gate_up),
    ("base_model.layers.*.ff_sub_layer.cond_ffn.w2", "layers.*.ff.experts.w2"),
]
ABSENT = {"norm_eps": 1e-5, "kvheads": 8, "max_expected_seq_len": 131_072}
BASE: list[Field] = [(theirs, ours, ABSENT.get(ours, default)) for theirs, ours, default in HF_DECODER]
FIELDS: list[Field] = [
    ("sliding_window", "sliding_window", None),
    ("num_local_experts", "num_experts", 8),
    ("num_experts_per_tok", "top_k_experts", 2),
]
ROUTER = ("output_router_logits", "router_aux_loss_coef")  # only of losses
_MAP = hf_map(
    "mixtral",
    "MixtralForCausalLM",
    FIELDS,
    base=BASE,
    fixed={**HF_FIXED, "router_jitter_noise": (0.0, None)},
    harmless=ROUTER,
)


def _read(left: Values, ours: Values) -> Values:
    left["rope_theta"] = left.get("rope_theta") or 1_000_000.0
    return _MAP.read_more(left, ours)


register_source("mixtral", "hf", [*REST_OF_HF, *EXPERTS], replace(_MAP, read_more=_read))
register_source("mixtral", "mistral", MISTRAL)
register_source("mixtral", "fms", [*FMS, *FMS_EXPERTS])
