"""The residual blocks, pre-norm and post-norm, in the form that is read, trained and tuned."""

from torch import Tensor, nn

from fms.kernels.attend import Angles, LayerCache
from fms.modules.attention import Attention
from fms.modules.tp import Plan


class Block(nn.Module):
    """`x + scale * attn(ln(x))`, then `x + scale * ff(ff_ln(x))`; `dropout` is that of both branches."""

    def __init__(
        self, ln: nn.Module, attn: Attention, ff_ln: nn.Module, ff: nn.Module, scale: float = 1.0, dropout: float = 0.0
    ):
        super().__init__()
        self.ln, self.attn, self.ff_ln, self.ff, self.scale = ln, attn, ff_ln, ff, scale
        self.dropout = nn.Dropout(dropout)

    def tp_plan(self, tp: int) -> Plan:
        return {"ln": "norm", "ff_ln": "norm", "dropout": "dropout"}

    def forward(
        self, x: Tensor, angles: Angles | None, mask: Tensor | None = None, layer: LayerCache | None = None
    ) -> Tensor:
        x = x + self.scale * self.dropout(self.attn(self.ln(x), angles, mask, layer))
        return x + self.scale * self.dropout(self.ff(self.ff_ln(x)))


class EncoderBlock(nn.Module):
    """`ln(x + attn(x))`, then `ff_ln(x + ff(x))`: the post-norm block; `dropout` is that of both branches."""

    def __init__(self, attn: Attention, ln: nn.Module, ff: nn.Module, ff_ln: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.attn, self.ln, self.ff, self.ff_ln = attn, ln, ff, ff_ln
        self.dropout = nn.Dropout(dropout)

    def tp_plan(self, tp: int) -> Plan:
        return {"ln": "norm", "ff_ln": "norm", "dropout": "dropout"}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.ln(x + self.dropout(self.attn(x, None, mask, None)))
        return self.ff_ln(x + self.dropout(self.ff(x)))
