"""LLaMA: configuration, parts, variants, weight tables (arXiv 2302.13971, 2307.09288, 2407.21783)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fms.models.decoder import Decoder
from fms.models.registry import register_variants
from fms.modules.attention import Attention
from fms.modules.block import Block
from fms.modules.embedding import Embedding
from fms.modules.feedforward import GatedLinearUnit
from fms.modules.head import Head
from fms.modules.positions import Rope, RopeScaling
from fms.utils.config import DecoderConfig
from fms.utils.serialization.config_gguf import gguf_map
from fms.utils.serialization.config_hf import hf_map
from fms.utils.serialization.config_meta import meta_map
from fms.utils.serialization.sources import register_source
from fms.utils.serialization.tables import Index, Rule, neighbours_to_halves


@dataclass(frozen=True)
class LLaMAConfig(DecoderConfig):
    """The common vocabulary; the defaults are Llama 2 7B's."""


def llama_parts(
    c: DecoderConfig,
    *,
    attention_scale: float | None = None,
    residual_scale: float = 1.0,
    embedding_multiplier: float = 1.0,
    logits_scaling: float = 1.0,
    qk_norm: bool = False,
    window: int | None = None,
    feed_forward: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """What LLaMA and its kin give to `Decoder`: RMSNorm, rotary positions, grouped queries, gated linear units."""

    def norm(dim: int = c.emb_dim) -> nn.RMSNorm:
        return nn.RMSNorm(dim, eps=c.norm_eps)

    def block() -> Block:
        attn = Attention(
            c.emb_dim,
            c.nheads,
            c.kvheads,
            c.head_dim,
            c.attn_bias,
            attention_scale,
            c.p_dropout,
            q_norm=norm(c.head_dim) if qk_norm else None,
            k_norm=norm(c.head_dim) if qk_norm else None,
        )
        ff = feed_forward() if feed_forward else GatedLinearUnit(c.emb_dim, c.hidden_dim, c.activation_fn, c.mlp_bias)
        return Block(norm(), attn, norm(), ff, residual_scale)

    return {
        "embedding": Embedding(c.src_vocab_size, c.emb_dim, padding_idx=c.pad_id),
        "layers": [block() for _ in range(c.nlayers)],
        "dec_norm": norm(),
        "head": Head(c.emb_dim, c.src_vocab_size, logits_scaling),
        "rope": Rope(c.head_dim, c.rope_theta, c.rope_scaling),
        "embedding_multiplier": embedding_multiplier,
        "window": window,
    }


class LLaMA(Decoder):
    """The parts as they are."""

    def __init__(self, config: LLaMAConfig | None = None, /, **overrides: Any):
        c = (config or _7B).updated(**overrides)
        super().__init__(c, **llama_parts(c))


_7B = LLaMAConfig()
_13B = _7B.updated(emb_dim=5120, nheads=40, kvheads=40, nlayers=40, hidden_dim=13_824)
_70B = _7B.updated(emb_dim=8192, nheads=64, kvheads=8, nlayers=80, hidden_dim=28_672)
_3_8B = _7B.updated(src_vocab_size=128_256, kvheads=8, hidden_dim=14_336, max_expected_seq_len=8192, rope_theta=5e5)
_LONG = RopeScaling("llama3", factor=8.0, original_max_len=8192)
_3_1_8B = _3_8B.updated(max_expected_seq_len=131_072, rope_scaling=_LONG)
_3_2 = _3_1_8B.updated(rope_scaling=RopeScaling("llama3", factor=32.0, original_max_len=8192), tie_heads=True)
_CODE = _7B.updated(src_vocab_size=49_152, pad_id=0, p_dropout=0.1, attn_bias=True, mlp_bias=True, tie_heads=True)
VARIANTS = {
    "7b": _7B,
    "13b": _13B,
    "70b": _70B,
    "2-7b": _7B,
    "2-13b": _13B,
    "2-70b": _70B,
    "3-8b": _3_8B,
    "3.1-8b": _3_1_8B,
    "3.2-1b": _3_2.updated(emb_dim=2048, head_dim=64, nlayers=16, hidden_dim=8192),
    "3.2-3b": _3_2.updated(emb_dim=3072, nheads=24, nlayers=28, hidden_dim=8192),
    "granite-7b": _7B.updated(src_vocab_size=32_008),
    "granite.code-3b": _CODE.updated(emb_dim=2560, head_dim=80, hidden_dim=10_240, max_expected_seq_len=2048),
    "granite.code-8b": _CODE.updated(kvheads=8, nlayers=36, hidden_dim=14_336),
    "micro": _7B.updated(
        src_vocab_size=256,
        emb_dim=192,
        nheads=4,
        kvheads=4,
        head_dim=48,
        nlayers=5,
        hidden_dim=512,
        max_expected_seq_len=1024,
    ),
}
register_variants("llama", LLaMA, VARIANTS)


# Weights: (their name, our name or names[, which of their rows each of ours is])
def query_halves(c: DecoderConfig) -> list[Tensor]:
    return [neighbours_to_halves(c.nheads, c.head_dim)]


def key_halves(c: DecoderConfig) -> list[Tensor]:
    return [neighbours_to_halves(c.kvheads, c.head_dim)]


def fused_qkv(c: DecoderConfig) -> list[Index]:
    q, kv = c.nheads * c.head_dim, c.kvheads * c.head_dim
    return [*query_halves(c), *(q + rows for rows in key_halves(c)), slice(q + kv, q + 2 * kv)]


def fused_gate_up(c: DecoderConfig) -> list[Index]:
    return [slice(0, c.hidden_dim), slice(c.hidden_dim, 2 * c.hidden_dim)]


HF: list[Rule] = [
    ("model.embed_tokens", "embedding"),
    ("model.layers.*.input_layernorm", "layers.*.ln"),
    ("model.layers.*.self_attn.q_proj", "layers.*.attn.query"),
    ("model.layers.*.self_attn.k_proj", "layers.*.attn.key"),
    ("model.layers.*.self_attn.v_proj", "layers.*.attn.value"),
    ("model.layers.*.self_attn.o_proj", "layers.*.attn.dense"),
    ("model.layers.*.self_attn.rotary_emb.inv_freq", None),
    ("model.layers.*.post_attention_layernorm", "layers.*.ff_ln"),
    ("model.layers.*.mlp.gate_proj", "layers.*.ff.wg"),
    ("model.layers.*.mlp.up_proj", "layers.*.ff.w1"),
    ("model.layers.*.mlp.down_proj", "layers.*.ff.w2"),
    ("model.norm", "dec_norm"),
    ("lm_head", "head"),
]
META: list[Rule] = [
    ("tok_embeddings", "embedding"),
    ("layers.*.attention_norm", "layers.*.ln"),
    ("layers.*.attention.wq", "layers.*.attn.query", query_halves),
    ("layers.*.attention.wk", "layers.*.attn.key", key_halves),
    ("layers.*.attention.wv", "layers.*.attn.value"),
    ("layers.*.attention.wo", "layers.*.attn.dense"),
    ("layers.*.ffn_norm", "layers.*.ff_ln"),
    ("layers.*.feed_forward.w1", "layers.*.ff.wg"),
    ("layers.*.feed_forward.w3", "layers.*.ff.w1"),
    ("layers.*.feed_forward.w2", "layers.*.ff.w2"),
    ("norm", "dec_norm"),
    ("output", "head"),
]
GGUF: list[Rule] = [
    ("token_embd", "embedding"),
    ("blk.*.attn_norm", "layers.*.ln"),
    ("blk.*.attn_q", "layers.*.attn.query", query_halves),
    ("blk.*.attn_k", "layers.*.attn.key", key_halves),
    ("blk.*.attn_v", "layers.*.attn.value"),
    ("blk.*.attn_output", "layers.*.attn.dense"),
    ("blk.*.ffn_norm", "layers.*.ff_ln"),
    ("blk.*.ffn_gate", "layers.*.ff.wg"),
    ("blk.*.ffn_up", "layers.*.ff.w1"),
    ("blk.*.ffn_down", "layers.*.ff.w2"),
    ("output_norm", "dec_norm"),
    ("output", "head"),
    ("rope_freqs", None),  # read as the rotary scaling of the configuration
]
QKV = ("layers.*.attn.query", "layers.*.attn.key", "layers.*.attn.value")
FMS: list[Rule] = [
    ("base_model.embedding", "embedding"),
    ("base_model.layers.*.ln", "layers.*.ln"),
    ("base_model.layers.*.attn.in_proj.qkv_fused", QKV, fused_qkv),
    ("base_model.layers.*.attn.in_proj.query", "layers.*.attn.query", query_halves),
    ("base_model.layers.*.attn.in_proj.key", "layers.*.attn.key", key_halves),
    ("base_model.layers.*.attn.in_proj.value", "layers.*.attn.value"),
    ("base_model.layers.*.attn.dense", "layers.*.attn.dense"),
    ("base_model.layers.*.ff_ln", "layers.*.ff_ln"),
    ("base_model.layers.*.ff_sub_layer.wg1_fused", ("layers.*.ff.wg", "layers.*.ff.w1"), fused_gate_up),
    ("base_model.layers.*.ff_sub_layer.wg", "layers.*.ff.wg"),
    ("base_model.layers.*.ff_sub_layer.w1", "layers.*.ff.w1"),
    ("base_model.layers.*.ff_sub_layer.w2", "layers.*.ff.w2"),
    ("base_model.dec_norm", "dec_norm"),
    ("head", "head"),
]
# for families that are not fused there: what comes first is what is written
FMS_UNFUSED = sorted(FMS, key=lambda rule: "fused" in rule[0])
register_source("llama", "hf", HF, hf_map("llama", "LlamaForCausalLM"))
register_source("llama", "meta", META, meta_map())
register_source("llama", "gguf", GGUF, gguf_map("llama"))
register_source("llama", "fms", FMS)
