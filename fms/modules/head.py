"""The projection to the vocabulary."""

from collections.abc import Callable

from torch import Tensor, nn

from fms.kernels.norm_linear import norm_linear


class Head(nn.Linear):
    """Logits of hidden states, divided by `scaling`. `head(h)` is over the whole vocabulary, `head.local(h)` over
    the share that this process holds."""

    def __init__(self, emb_dim: int, vocab_size: int, scaling: float = 1.0, bias: bool = False):
        super().__init__(emb_dim, vocab_size, bias=bias)
        self.scaling = scaling

    def local(self, h: Tensor) -> Tensor:
        logits = norm_linear(h, None, self)
        return logits if self.scaling == 1 else logits / self.scaling

    def forward(self, h: Tensor, use: Callable[[Tensor, "Head"], Tensor] | None = None) -> Tensor:
        """Logits, or `use(h, self)`: what needs the weights themselves, which FSDP has here."""
        return self.local(h) if use is None else use(h, self)
