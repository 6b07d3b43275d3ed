"""The metadata of GGUF files."""

from collections.abc import Sequence
from typing import Any

import torch

from fms.modules.positions import Rope, RopeScaling
from fms.utils.serialization.config_map import REQUIRED, ConfigMap, Field, Values
from fms.utils.serialization.errors import CheckpointError

GGUF_LLAMA3 = [RopeScaling("llama3", factor=f, original_max_len=8192) for f in (8.0, 32.0)]


def gguf_map(name: str, fields: Sequence[Field] = ()) -> ConfigMap:
    """The metadata of a GGUF file, without the architecture's prefix. Who reads it adds `vocab_size`, `tied`,
    `attn_bias`, `mlp_bias` and `rope_freqs` (the factors, or none) from the tensors."""
    common: list[Field] = [
        ("embedding_length", "emb_dim", REQUIRED),
        ("block_count", "nlayers", REQUIRED),
        ("feed_forward_length", "hidden_dim", REQUIRED),
        ("attention.head_count", "nheads", REQUIRED),
        ("attention.head_count_kv", "kvheads", lambda v: v["attention.head_count"]),
        ("attention.key_length", "head_dim", lambda v: v["embedding_length"] // v["attention.head_count"]),
        ("attention.layer_norm_rms_epsilon", "norm_eps", REQUIRED),
        ("context_length", "max_expected_seq_len", REQUIRED),
        ("rope.freq_base", "rope_theta", 10_000.0),
        ("vocab_size", "src_vocab_size", REQUIRED),
        ("tied", "tie_heads", REQUIRED),
        ("attn_bias", "attn_bias", REQUIRED),
        ("mlp_bias", "mlp_bias", REQUIRED),
    ]

    def read_more(left: Values, ours: Values) -> Values:
        for size in ("rope.dimension_count", "attention.value_length"):
            if (value := left.pop(size, ours["head_dim"])) != ours["head_dim"]:
                raise CheckpointError(f"{size}={value} must be the size of a head, {ours['head_dim']}")
        kind = left.pop("rope.scaling.type", "none")
        factor = left.pop("rope.scaling.factor", 1.0)
        original = left.pop("rope.scaling.original_context_length", ours["max_expected_seq_len"])
        freqs = left.pop("rope_freqs")
        scaling = None
        if kind in ("linear", "yarn"):
            scaling = RopeScaling(kind, factor=factor, original_max_len=original)
        elif kind != "none":
            raise CheckpointError(f"rope.scaling.type={kind!r} is not supported here, only none, linear and yarn")
        if freqs is not None:
            if scaling is not None:
                raise CheckpointError(f"rope_freqs.weight beside rope.scaling.type={kind!r} is not supported here")
            scaling = _llama3_of(freqs, ours["head_dim"], ours["rope_theta"])
        return {"rope_scaling": scaling}

    def write_more(config: Any) -> Values:
        raise CheckpointError("GGUF files are read, not written")

    fixed = {"expert_count": (0,), "expert_used_count": (0,), "attention.sliding_window": (0,)}
    harmless = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})
    return ConfigMap((name,), [*common, *fields], fixed, harmless, {}, read_more, write_more)


def _llama3_of(divisors: Any, head_dim: int, theta: float) -> RopeScaling | None:
    """The scaling whose frequencies are the plain ones divided by `divisors` (head_dim / 2)."""
    plain = Rope(head_dim, theta).frequencies(divisors.device, 0)
    for scaling in (None, *GGUF_LLAMA3):
        freqs = Rope(head_dim, theta, scaling).frequencies(divisors.device, 0)
        if torch.allclose(plain / freqs, divisors.float(), rtol=1e-3):
            return scaling
    raise CheckpointError("rope_freqs.weight holds divisors of no rotary scaling known here (llama3 by 8 or by 32)")
