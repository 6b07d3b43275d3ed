"""Feed-forward layers and their activations."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fms.modules.tp import Plan, divided, pad_inputs, pad_outputs, rounded

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class GatedLinearUnit(nn.Module):
    """`w2(act(wg(x)) * w1(x))` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, emb_dim: int, hidden_dim: int, activation: str = "silu", bias: bool = False):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.wg = nn.Linear(emb_dim, hidden_dim, bias=bias)
        self.w1 = nn.Linear(emb_dim, hidden_dim, bias=bias)
        self.w2 = nn.Linear(hidden_dim, emb_dim, bias=bias)

    def tp_plan(self, tp: int) -> Plan:
        divided("hidden channels", self.w1.out_features, tp)
        return {"": "enter", "wg": "colwise", "w1": "colwise", "w2": "rowwise"}

    def pad(self, tp: int) -> str | None:
        """Add channels of zeros, which change nothing, until `tp` ranks can share them. Says what became of them."""
        return _pad(tp, self.w2, self.wg, self.w1)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.wg(x)) * self.w1(x))


class FeedForward(nn.Module):
    """`w2(act(w1(x)))`."""

    def __init__(self, emb_dim: int, hidden_dim: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.w1 = nn.Linear(emb_dim, hidden_dim, bias=bias)
        self.w2 = nn.Linear(hidden_dim, emb_dim, bias=bias)

    def tp_plan(self, tp: int) -> Plan:
        divided("hidden channels", self.w1.out_features, tp)
        return {"": "enter", "w1": "colwise", "w2": "rowwise"}

    def pad(self, tp: int) -> str | None:
        """As that of the gated one."""
        return _pad(tp, self.w2, self.w1)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)))


def _pad(tp: int, down: nn.Linear, *up: nn.Linear) -> str | None:
    hidden = down.in_features
    if hidden % tp == 0:
        return None
    pad_outputs(*up, size=rounded(hidden, tp))
    pad_inputs(down, rounded(hidden, tp))
    return f"{hidden} hidden channels become {down.in_features}"
