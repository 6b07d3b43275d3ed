"""Configurations: frozen dataclasses of plain final numbers, with JSON round trip."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

from fms.modules.feedforward import ACTIVATIONS
from fms.modules.positions import RopeScaling
from fms.utils.serialization.errors import nearest

SIZES = ["src_vocab_size", "emb_dim", "nheads", "kvheads", "head_dim", "nlayers", "hidden_dim", "max_expected_seq_len"]


@dataclass(frozen=True)
class ModelConfig:
    """What every family's configuration can do. Subclasses add fields and check them in `__post_init__`."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from plain values. Raises `ValueError` on a field that this configuration does not have."""
        check_fields(cls, values)
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
        check_fields(type(self), changes)
        for name, value in changes.items():
            old = getattr(self, name)
            if isinstance(value, dict) and is_dataclass(old) and not isinstance(old, type):
                check_fields(type(old), value)
                changes[name] = replace(old, **value)
        return replace(self, **changes)


def check_fields(kind: type, names: Iterable[str]) -> None:
    """Raise `ValueError` for a name that is not one of a dataclass's fields."""
    known = [f.name for f in fields(kind)]
    for name in names:
        if name not in known:
            raise ValueError(f"{kind.__name__} has no field {name!r}{nearest(name, known)}; it has {', '.join(known)}")


def check_values(config: Any, sizes: Iterable[str]) -> None:
    """Raise `ValueError` for what can't be: sizes, switches, numbers, the activation, the padding id, a dropout."""
    for name in sizes:
        if not isinstance(size := getattr(config, name), int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is bool and not isinstance(value, bool):
            raise ValueError(f"{field.name}={value!r} must be True or False")
        if field.type is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{field.name}={value!r} must be a number")
    if config.activation_fn not in ACTIVATIONS:
        raise ValueError(
            f"activation_fn={config.activation_fn!r} is not known{nearest(config.activation_fn, ACTIVATIONS)}; "
            f"known are {', '.join(ACTIVATIONS)}"
        )
    if config.pad_id is not None and not 0 <= config.pad_id < config.src_vocab_size:
        raise ValueError(f"pad_id={config.pad_id} must lie in the vocabulary of {config.src_vocab_size}")
    for name in (f.name for f in fields(config) if f.name.endswith("dropout")):
        if (share := getattr(config, name)) is not None and not 0 <= share < 1:
            raise ValueError(f"{name}={share} must lie in [0, 1)")


@dataclass(frozen=True)
class CausalConfig(ModelConfig):
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
    attn_bias: bool = False
    mlp_bias: bool = False
    tie_heads: bool = False
    p_dropout: float = 0.0
    pad_id: int | None = None

    def __post_init__(self) -> None:
        check_values(self, SIZES)
        if self.nheads % self.kvheads:
            raise ValueError(f"nheads={self.nheads} must be a multiple of kvheads={self.kvheads}")

    @property
    def max_positions(self) -> int:
        """How many positions the model takes."""
        return self.max_expected_seq_len


@dataclass(frozen=True)
class DecoderConfig(CausalConfig):
    """The same, for families with rotary positions."""

    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rope_scaling, dict):
            check_fields(RopeScaling, self.rope_scaling)
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings pair its two halves")

    @property
    def max_positions(self) -> int:
        """A scaling that stretches the original context counts."""
        scaling = self.rope_scaling
        return self.max_expected_seq_len if scaling is None else scaling.stretched(self.max_expected_seq_len)
