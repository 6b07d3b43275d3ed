"""Meta's params.json."""

from typing import Any

from fms.modules.positions import RopeScaling
from fms.utils.serialization.config_map import REQUIRED, ConfigMap, Field, Values
from fms.utils.serialization.errors import CheckpointError


def meta_map() -> ConfigMap:
    """LLaMA's `params.json`. Sizes that it leaves out (`vocab_size` -1, the feed-forward's) come from the weights: who
    reads the file adds `vocab_size`, `hidden_dim` and `tied`."""
    fields: list[Field] = [
        ("dim", "emb_dim", REQUIRED),
        ("n_layers", "nlayers", REQUIRED),
        ("n_heads", "nheads", REQUIRED),
        ("n_kv_heads", "kvheads", lambda v: v["n_heads"]),
        ("vocab_size", "src_vocab_size", REQUIRED),
        ("norm_eps", "norm_eps", 1e-5),
        ("rope_theta", "rope_theta", 10_000.0),
    ]

    def read_more(left: Values, ours: Values) -> Values:
        scaling = None
        factor = left.pop("rope_scaling_factor", 32.0 if ours["emb_dim"] < 4096 else 8.0)  # 3.2 is small, 3.1 is not
        if left.pop("use_scaled_rope", False):
            scaling = RopeScaling("llama3", factor=factor, original_max_len=8192)
        length = 131_072 if scaling else 8192 if ours["src_vocab_size"] == 128_256 else 4096
        return {
            "hidden_dim": left.pop("hidden_dim"),
            "tie_heads": left.pop("tied"),
            "head_dim": ours["emb_dim"] // ours["nheads"],
            "rope_scaling": scaling,
            "max_expected_seq_len": left.pop("max_seq_len", length),
        }

    def write_more(config: Any) -> Values:
        c, s = config, config.rope_scaling
        expected = {"attn_bias": False, "mlp_bias": False, "activation_fn": "silu", "head_dim": c.emb_dim // c.nheads}
        for name, value in expected.items():
            if getattr(c, name) != value:
                raise CheckpointError(f"params.json cannot say {name}={getattr(c, name)!r}, only {value!r}")
        known = None if s is None else RopeScaling("llama3", factor=s.factor, original_max_len=8192)
        if s != known:
            raise CheckpointError(f"params.json cannot say rope_scaling={s}, only {known}")
        scaled = {} if s is None else {"use_scaled_rope": True, "rope_scaling_factor": s.factor}
        multiplier = (c.hidden_dim + 0.5) / int(8 * c.emb_dim / 3)  # theirs is cut to a whole number: no less, no more
        return scaled | {"multiple_of": 1, "ffn_dim_multiplier": multiplier}

    harmless = frozenset({"multiple_of", "ffn_dim_multiplier", "max_batch_size"})
    return ConfigMap(("llama",), fields, {}, harmless, {}, read_more, write_more)
