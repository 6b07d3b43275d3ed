"""Configurations: frozen dataclasses of plain final numbers, with JSON round trip."""

import json
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

from fms.modules.positions import RopeScaling
from fms.utils.serialization.errors import nearest


@dataclass(frozen=True)
class ModelConfig:
    """What every family's configuration can do. Subclasses add fields and check them in `__post_init__`."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values. Raises `ValueError` on a field that this configuration does not have."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"{cls.__name__} has no field {name!r}{nearest(name, known)}; it has {', '.join(known)}"
                )
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return cls.from_dict(json.loads(Path(path).expanduser().read_text()))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        Path(path).expanduser().write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def updated(self, **changes: Any) -> Self:
        """A copy with some fields changed. A dict changes fields of a nested configuration. Unknown fields raise."""
        known = [f.name for f in fields(self)]
        for name, value in changes.items():
            if name not in known:
                raise ValueError(
                    f"{type(self).__name__} has no field {name!r}{nearest(name, known)}; it has {', '.join(known)}"
                )
            old = getattr(self, name)
            if isinstance(value, dict) and is_dataclass(old) and not isinstance(old, type):
                changes[name] = replace(old, **value)
        return replace(self, **changes)


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The vocabulary that causal families share. Sizes are counts of elements; `None` means there is none."""

    src_vocab_size: int = 32_000
    emb_dim: int = 4096
    nheads: int = 32
    kvheads: int = 32
    head_dim: int = 128
    nlayers: int = 32
    hidden_dim: int = 11_008
    norm_eps: float = 1e-5
    activation_fn: str = "silu"
    max_expected_seq_len: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    attn_bias: bool = False
    mlp_bias: bool = False
    tie_heads: bool = False
    p_dropout: float = 0.0
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for name in ("src_vocab_size", "emb_dim", "nheads", "kvheads", "head_dim", "nlayers", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.nheads % self.kvheads:
            raise ValueError(f"nheads={self.nheads} must be a multiple of kvheads={self.kvheads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings pair its two halves")
        if self.pad_id is not None and not 0 <= self.pad_id < self.src_vocab_size:
            raise ValueError(f"pad_id={self.pad_id} must lie in the vocabulary of {self.src_vocab_size}")
        if not 0 <= self.p_dropout < 1:
            raise ValueError(f"p_dropout={self.p_dropout} must lie in [0, 1)")

    @property
    def max_positions(self) -> int:
        """How many positions the model takes: a scaling that stretches the original context counts."""
        scaling = self.rope_scaling
        return self.max_expected_seq_len if scaling is None else scaling.stretched(self.max_expected_seq_len)
