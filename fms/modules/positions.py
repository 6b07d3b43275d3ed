"""Rotary angles as a function of positions: nothing to load, to cache per device or to fix after the meta device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fms.kernels.attend import Angles

KINDS = ("linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change beyond the context `original_max_len` that a model was trained on.

    linear: positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
    dynamic: theta grows with the length once it passes `original_max_len` (NTK-aware).
    llama3: wavelengths beyond original_max_len / `low_freq_factor` are divided by `factor`, those under
        original_max_len / `high_freq_factor` are kept, a linear blend between.
    yarn: a blend by dimension between `beta_fast` and `beta_slow` rotations, and cos and sin multiplied by
        `attention_factor`, or by 0.1 ln(factor) + 1 where it is None (Peng et al. 2023, arXiv 2309.00071).
    """

    kind: str
    factor: float = 1.0
    original_max_len: int = 4096
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rotary scaling kind {self.kind!r}: known are {', '.join(KINDS)}")
        if self.factor < 1:
            raise ValueError(f"rotary scaling factor={self.factor} must be at least 1")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}"
            )

    def stretched(self, max_len: int) -> int:
        """The number of positions that a model with this scaling takes; llama3's `max_len` counts it already."""
        return max_len if self.kind == "llama3" else max(max_len, int(self.factor * self.original_max_len))

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) on halves: channel i pairs with i + head_dim / 2."""

    head_dim: int
    theta: float = 10_000.0
    scaling: RopeScaling | None = None

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on how long sequences get."""
        return self.scaling is not None and self.scaling.kind == "dynamic"

    def __call__(self, positions: Tensor, length: int | Tensor | None) -> Angles:
        """Angles at integer `positions` (b or 1, s), as `rotate` takes them: fp32 (b or 1, s, 1, head_dim) each.

        `length`, an int or one a row (b, 1), is how long the sequences will get. Only frequencies of the kind
        `dynamic` depend on it, and raise `ValueError` if it is `None`; it has to stay the same as long as keys rotated
        with it are in use.
        """
        freqs = self.frequencies(positions.device, length)
        angles = positions[..., None].float() * freqs  # b s d/2
        amplitude = self.scaling.amplitude if self.scaling else 1.0
        cos, sin = (angles.cos() * amplitude)[:, :, None], (angles.sin() * amplitude)[:, :, None]
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def frequencies(self, device: torch.device, length: int | Tensor | None) -> Tensor:
        """Radians a position, highest first: (head_dim / 2), or (b, 1, head_dim / 2) with a length a row."""
        exponents = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
        s = self.scaling
        if s is None:
            return 1.0 / self.theta**exponents
        if self.by_length:
            if length is None:
                raise ValueError(
                    "dynamic rotary scaling needs to know how long sequences get: model.make_cache(batch, max_len)"
                )
            ratio = torch.as_tensor(length, device=device).clamp(min=s.original_max_len).float() / s.original_max_len
            stretch = s.factor * ratio - (s.factor - 1)
            theta = self.theta * stretch ** (self.head_dim / (self.head_dim - 2))
            return 1.0 / theta[..., None] ** exponents
        freqs = 1.0 / self.theta**exponents
        if s.kind == "linear":
            return freqs / s.factor
        if s.kind == "llama3":
            rotations = s.original_max_len * freqs / (2 * math.pi)  # over the original context
            keep = (rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        else:
            low, high = self._dim_of(s.beta_fast), self._dim_of(s.beta_slow)
            if s.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.head_dim - 1)
            ramp = torch.arange(self.head_dim // 2, device=device).float() - low
            keep = 1 - ramp / (high - low if high != low else 0.001)
        keep = keep.clamp(0, 1)
        return keep * freqs + (1 - keep) * freqs / s.factor

    def _dim_of(self, rotations: float) -> float:
        """The (fractional) pair that turns so many times over the original context."""
        assert self.scaling is not None
        wavelength = self.scaling.original_max_len / (rotations * 2 * math.pi)
        return self.head_dim * math.log(wavelength) / (2 * math.log(self.theta))
