"""Granite 4, those without state-space layers: Granite with experts, or without (IBM Granite team 2025)."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fms.models.decoder import Decoder
from fms.models.granite import MULTIPLIERS, GraniteConfig, granite_parts
from fms.models.llama import FMS_UNFUSED, fused_gate_up
from fms.models.mixtral import REST_OF_HF, ROUTER, stacked_gate_up
from fms.models.registry import register_variants
from fms.modules.feedforward import GatedLinearUnit
from fms.modules.moe import MixtureOfExperts, SharedExpert
from fms.utils.serialization.config_hf import HF_DECODER, HF_FIXED, hf_map
from fms.utils.serialization.config_map import Field, Values
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.sources import register_source
from fms.utils.serialization.tables import Rule, Taken


@dataclass(frozen=True)
class GraniteMoeHybridConfig(GraniteConfig):
    """Granite's; `hidden_dim` is the width of the layer that all tokens go through. Beside it a token goes through
    `top_k_experts` of `num_experts` experts, each `expert_dim` wide. Not `rotary`, nothing tells of positions."""

    num_experts: int = 0
    top_k_experts: int = 0
    expert_dim: int | None = None
    rotary: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_bias:
            raise ValueError("mlp_bias=True: Granite 4 has no biases in its feed-forward layers")
        experts, chosen, width = self.num_experts, self.top_k_experts, self.expert_dim or 0
        if (experts or chosen or width) and not (1 <= chosen <= experts and width >= 1):
            raise ValueError(
                f"num_experts={experts}, top_k_experts={chosen}, expert_dim={self.expert_dim}: experts have a width "
                "and at least one is chosen; without any it is 0, 0, None"
            )


class GraniteMoeHybrid(Decoder):
    """Granite's parts, with experts beside the feed-forward layer, or without."""

    def __init__(self, config: GraniteMoeHybridConfig | None = None, /, **overrides: Any):
        c = (config or _8B).updated(**overrides)

        def feed_forward() -> nn.Module:
            if c.expert_dim is None:
                return GatedLinearUnit(c.emb_dim, c.hidden_dim, c.activation_fn)
            routed = MixtureOfExperts(c.emb_dim, c.expert_dim, c.num_experts, c.top_k_experts, c.activation_fn)
            return SharedExpert(c.emb_dim, c.hidden_dim, routed, c.activation_fn)

        parts = granite_parts(c, feed_forward=feed_forward)
        super().__init__(c, **(parts if c.rotary else parts | {"rope": None}))


_8B = GraniteMoeHybridConfig(
    src_vocab_size=100_352,
    kvheads=8,
    nlayers=40,
    hidden_dim=12_800,
    max_expected_seq_len=8192,
    rope_theta=10_000_000.0,
    tie_heads=True,
    pad_id=100_256,
    embedding_multiplier=12.0,
    logits_scaling=16.0,
    residual_multiplier=0.22,
    attention_multiplier=0.0078125,
)
VARIANTS = {"8b": _8B}
register_variants("granite_moe_hybrid", GraniteMoeHybrid, VARIANTS)


def gate_up(c: GraniteMoeHybridConfig) -> list[Taken]:
    assert c.expert_dim is not None
    return stacked_gate_up(c.expert_dim)


EXPERTS = ("layers.*.ff.routed.experts.wg", "layers.*.ff.routed.experts.w1")
HF: list[Rule] = [
    *REST_OF_HF,
    ("model.layers.*.shared_mlp.input_linear", ("layers.*.ff.wg", "layers.*.ff.w1"), fused_gate_up),
    ("model.layers.*.shared_mlp.output_linear", "layers.*.ff.w2"),
    ("model.layers.*.block_sparse_moe.router.layer", "layers.*.ff.routed.gate"),
    ("model.layers.*.block_sparse_moe.input_linear.weight", EXPERTS, gate_up),
    ("model.layers.*.block_sparse_moe.output_linear.weight", "layers.*.ff.routed.experts.w2"),
    # as transformers 5 has them in memory
    ("model.layers.*.block_sparse_moe.router", "layers.*.ff.routed.gate"),
    ("model.layers.*.block_sparse_moe.experts.gate_up_proj", EXPERTS, gate_up),
    ("model.layers.*.block_sparse_moe.experts.down_proj", "layers.*.ff.routed.experts.w2"),
]
SHARED: Field = ("shared_intermediate_size", "hidden_dim", 1024)
FIELDS: list[Field] = [
    *MULTIPLIERS,
    ("num_local_experts", "num_experts", 8),
    ("num_experts_per_tok", "top_k_experts", 2),
    ("intermediate_size", "expert_dim", 11_008),
]
_MAP = hf_map(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    FIELDS,
    base=[SHARED if field[1] == "hidden_dim" else field for field in HF_DECODER],
    fixed={**HF_FIXED, "normalization_function": ("rmsnorm",)},
    harmless=("mamba_*", "time_step_limit", "init_method", *ROUTER),
)


def _read(left: Values, ours: Values) -> Values:
    kinds, written = left.pop("layer_types", None), left.pop("layers_block_type", None)
    kinds = kinds or written or ["mamba"] * ours["nlayers"]
    if other := sorted(set(kinds) - {"attention", "full_attention"}):
        raise CheckpointError(f"layers of the kind {', '.join(other)} (state-space layers) are not supported")
    if len(kinds) != ours["nlayers"]:
        raise CheckpointError(f"layer_types names {len(kinds)} layers, num_hidden_layers is {ours['nlayers']}")
    if (position := left.pop("position_embedding_type", None)) not in ("rope", "nope", None):
        raise CheckpointError(f"position_embedding_type={position!r} is not supported, only 'rope', 'nope' and None")
    dense: Values = {} if ours["num_experts"] else {"top_k_experts": 0, "expert_dim": None}
    return dense | {"rotary": position == "rope"} | _MAP.read_more(left, ours)


def _write(c: GraniteMoeHybridConfig) -> Values:
    return {
        "layer_types": ["attention"] * c.nlayers,
        "mamba_n_heads": 2,  # there is no such layer, but it has to divide 2 emb_dim
        "intermediate_size": c.expert_dim or c.hidden_dim,
        "position_embedding_type": "rope" if c.rotary else "nope",
    } | _MAP.write_more(c)


register_source("granite_moe_hybrid", "hf", HF, replace(_MAP, read_more=_read, write_more=_write))
register_source("granite_moe_hybrid", "fms", FMS_UNFUSED)
