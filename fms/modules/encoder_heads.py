"""What stands on an encoder's states (b, s, emb_dim): one head a task."""

from collections.abc import Callable

from torch import Tensor, nn

from fms.modules.feedforward import ACTIVATIONS
from fms.modules.head import Head
from fms.modules.tp import Plan


class MaskedLMHead(nn.Module):
    """Logits of the token at each place, (b, s, vocabulary): `out(ln(act(dense(h))))`."""

    def __init__(self, emb_dim: int, vocab_size: int, activation: str, norm_eps: float):
        super().__init__()
        self.dense = nn.Linear(emb_dim, emb_dim)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]
        self.ln = nn.LayerNorm(emb_dim, eps=norm_eps)
        self.out = Head(emb_dim, vocab_size, bias=True)

    def tp_plan(self, tp: int) -> Plan:
        return {"dense": "whole", "ln": "whole", "out": "head"}

    def forward(self, h: Tensor) -> Tensor:
        return self.out(self.ln(self.activation(self.dense(h))))


class ClassificationHead(nn.Module):
    """Logits of the classes of each row, (b, classes), from its first token. `drop_input`: drop of that too."""

    def __init__(self, emb_dim: int, num_classes: int, dropout: float, drop_input: bool):
        super().__init__()
        self.drop_input = drop_input
        self.dense = nn.Linear(emb_dim, emb_dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(emb_dim, num_classes)

    def tp_plan(self, tp: int) -> Plan:
        return {"dense": "whole", "out": "whole"}

    def forward(self, h: Tensor) -> Tensor:
        first = self.dropout(h[:, 0]) if self.drop_input else h[:, 0]
        return self.out(self.dropout(self.dense(first).tanh()))


class SpanHead(nn.Module):
    """Logits of each place being the first and the last of the answer: two of (b, s)."""

    def __init__(self, emb_dim: int):
        super().__init__()
        self.out = nn.Linear(emb_dim, 2)

    def tp_plan(self, tp: int) -> Plan:
        return {"out": "whole"}

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.out(h).unbind(-1)
        return start.contiguous(), end.contiguous()


class Pooler(nn.Linear):
    """BERT's vector of a row, (b, emb_dim), from its first token; made for next-sentence prediction."""

    def __init__(self, emb_dim: int):
        super().__init__(emb_dim, emb_dim)

    def tp_plan(self, tp: int) -> Plan:
        return {"": "whole"}

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h[:, 0]).tanh()
