"""What the operations need of a linear layer."""

from typing import Protocol

from torch import Tensor


class Weights(Protocol):
    """A weight (out, in) and a bias (out) or none."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
