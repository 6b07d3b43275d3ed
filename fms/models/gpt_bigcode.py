"""GPT-BigCode: GPT-2 with multi-query attention (Ben Allal et al. 2023, arXiv 2301.03988)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fms.models.decoder import Decoder
from fms.models.registry import register_variants
from fms.modules.attention import Attention
from fms.modules.block import Block
from fms.modules.embedding import Embedding
from fms.modules.feedforward import FeedForward
from fms.modules.head import Head
from fms.utils.config import CausalConfig
from fms.utils.serialization.config_hf import HF_FIXED, hf_map
from fms.utils.serialization.config_map import REQUIRED, Field, Values
from fms.utils.serialization.errors import CheckpointError
from fms.utils.serialization.sources import register_source
from fms.utils.serialization.tables import Index, Rule


@dataclass(frozen=True)
class GPTBigCodeConfig(CausalConfig):
    """The common vocabulary; `p_dropout` is that of attention weights, the others of branches and of embeddings."""

    resid_dropout: float = 0.0
    emb_dropout: float = 0.0


class GPTBigCode(Decoder):
    """LayerNorm, learned positions, biases everywhere, one key and value head or as many as query heads."""

    def __init__(self, config: GPTBigCodeConfig | None = None, /, **overrides: Any):
        c = (config or VARIANTS["santacoder"]).updated(**overrides)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(c.emb_dim, eps=c.norm_eps)

        def block() -> Block:
            attn = Attention(c.emb_dim, c.nheads, c.kvheads, c.head_dim, c.attn_bias, dropout=c.p_dropout)
            ff = FeedForward(c.emb_dim, c.hidden_dim, c.activation_fn, c.mlp_bias)
            return Block(norm(), attn, norm(), ff, dropout=c.resid_dropout)

        super().__init__(
            c,
            embedding=Embedding(c.src_vocab_size, c.emb_dim, padding_idx=c.pad_id),
            position_embedding=Embedding(c.max_expected_seq_len, c.emb_dim),
            emb_dropout=c.emb_dropout,
            layers=[block() for _ in range(c.nlayers)],
            dec_norm=norm(),
            head=Head(c.emb_dim, c.src_vocab_size),
        )


_BASE = GPTBigCodeConfig(
    src_vocab_size=49_152,
    emb_dim=2048,
    nheads=16,
    kvheads=1,
    nlayers=24,
    hidden_dim=8192,
    max_expected_seq_len=2048,
    activation_fn="gelu_tanh",
    attn_bias=True,
    mlp_bias=True,
    tie_heads=True,
    pad_id=0,
)
_DROPOUTS = {"p_dropout": 0.1, "resid_dropout": 0.1, "emb_dropout": 0.1}
_13B = {"emb_dim": 5632, "nheads": 44, "nlayers": 40, "hidden_dim": 22_528, "max_expected_seq_len": 8192}
_20B = {"emb_dim": 6144, "nheads": 48, "nlayers": 52, "hidden_dim": 24_576, "max_expected_seq_len": 8192}
_MICRO = {"emb_dim": 192, "nheads": 4, "head_dim": 48, "nlayers": 5, "hidden_dim": 768, "max_expected_seq_len": 1024}
VARIANTS = {
    "santacoder": _BASE.updated(src_vocab_size=49_280, pad_id=None, **_DROPOUTS),
    "ibm.3b": _BASE.updated(emb_dim=3072, nheads=32, head_dim=96, nlayers=32, hidden_dim=12_288, activation_fn="gelu"),
    "ibm.13b": _BASE.updated(src_vocab_size=50_304, pad_id=50_280, **_13B, **_DROPOUTS),
    "ibm.20b": _BASE.updated(**_20B, **_DROPOUTS),
    "micro": _BASE.updated(src_vocab_size=256, **_MICRO),
}
register_variants("gpt_bigcode", GPTBigCode, VARIANTS)


def fused_qkv(c: GPTBigCodeConfig) -> Sequence[Index]:
    """Query, key and value rows one after the other, or of each head in turn where every head has its own keys."""
    if c.kvheads == 1:
        q, kv = c.nheads * c.head_dim, c.head_dim
        return [slice(0, q), slice(q, q + kv), slice(q + kv, q + 2 * kv)]
    return list(torch.arange(3 * c.nheads * c.head_dim).view(c.nheads, 3, c.head_dim).transpose(0, 1).flatten(1))


QKV = ("layers.*.attn.query", "layers.*.attn.key", "layers.*.attn.value")
HF: list[Rule] = [
    ("transformer.wte", "embedding"),
    ("transformer.wpe", "position_embedding"),
    ("transformer.h.*.ln_1", "layers.*.ln"),
    ("transformer.h.*.attn.c_attn", QKV, fused_qkv),
    ("transformer.h.*.attn.c_proj", "layers.*.attn.dense"),
    ("transformer.h.*.attn.bias", None),  # the causal mask of older files
    ("transformer.h.*.attn.masked_bias", None),
    ("transformer.h.*.ln_2", "layers.*.ff_ln"),
    ("transformer.h.*.mlp.c_fc", "layers.*.ff.w1"),
    ("transformer.h.*.mlp.c_proj", "layers.*.ff.w2"),
    ("transformer.ln_f", "dec_norm"),
    ("lm_head", "head"),
]
FMS: list[Rule] = [
    ("base_model.embedding", "embedding"),
    ("base_model.position_embedding", "position_embedding"),
    ("base_model.layers.*.ln", "layers.*.ln"),
    ("base_model.layers.*.attn.in_proj.qkv_fused", QKV, lambda c: fused_qkv(c) if c.kvheads == 1 else _in_turn(c)),
    ("base_model.layers.*.attn.in_proj.query", "layers.*.attn.query"),
    ("base_model.layers.*.attn.in_proj.key", "layers.*.attn.key"),
    ("base_model.layers.*.attn.in_proj.value", "layers.*.attn.value"),
    ("base_model.layers.*.attn.dense", "layers.*.attn.dense"),
    ("base_model.layers.*.ff_ln", "layers.*.ff_ln"),
    ("base_model.layers.*.ff_sub_layer.w1", "layers.*.ff.w1"),
    ("base_model.layers.*.ff_sub_layer.w2", "layers.*.ff.w2"),
    ("base_model.dec_norm", "dec_norm"),
    ("head", "head"),
]


def _in_turn(c: GPTBigCodeConfig) -> Sequence[Index]:
    q = c.nheads * c.head_dim
    return [slice(0, q), slice(q, 2 * q), slice(2 * q, 3 * q)]


FIELDS: list[Field] = [
    ("vocab_size", "src_vocab_size", REQUIRED),
    ("n_embd", "emb_dim", REQUIRED),
    ("n_head", "nheads", REQUIRED),
    ("n_layer", "nlayers", REQUIRED),
    ("n_positions", "max_expected_seq_len", 1024),
    ("n_inner", "hidden_dim", lambda values: 4 * values["n_embd"]),
    ("layer_norm_epsilon", "norm_eps", 1e-5),
    ("attn_pdrop", "p_dropout", 0.1),
    ("resid_pdrop", "resid_dropout", 0.1),
    ("embd_pdrop", "emb_dropout", 0.1),
    ("tie_word_embeddings", "tie_heads", True),
    ("pad_token_id", "pad_id", None),
]
_COMMON = hf_map(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    base=FIELDS,
    activation=("activation_function", "gelu_pytorch_tanh"),
    rope=False,
    fixed={**HF_FIXED, "scale_attn_weights": (True,)},
    harmless=("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "n_ctx", "summary_*", "inference_runner"),
)


def _read(left: Values, ours: Values) -> Values:
    kvheads = 1 if left.pop("multi_query", True) else ours["nheads"]
    if (said := left.pop("num_key_value_heads", kvheads)) != kvheads:
        raise CheckpointError(f"num_key_value_heads={said} must be {kvheads}, as multi_query says")
    return (
        {"kvheads": kvheads, "head_dim": ours["emb_dim"] // ours["nheads"]}
        | {"attn_bias": True, "mlp_bias": True}
        | _COMMON.read_more(left, ours)
    )


def _write(config: GPTBigCodeConfig) -> Values:
    return {"multi_query": config.kvheads == 1} | _COMMON.write_more(config)


register_source("gpt_bigcode", "hf", HF, replace(_COMMON, read_more=_read, write_more=_write))
register_source("gpt_bigcode", "fms", FMS)
