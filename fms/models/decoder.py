"""The one causal decoder. A family chooses its parts; none rewrites its forward."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fms.models.compile import compile_model
from fms.modules.cache import Cache, Recompute, StaticCache
from fms.modules.frozen import FrozenBlock
from fms.modules.head import Head
from fms.modules.initial import reset_parameters
from fms.modules.positions import Angles, Rope
from fms.modules.rolling import RollingCache
from fms.modules.tp import Communicator, Plan, embedded
from fms.utils.config import CausalConfig


class Decoder(nn.Module):
    """Embedding, blocks, a last norm, a head.

    `model(input_ids)` gives logits (b, s, vocabulary), `model.hidden(...)` the states (b, s, emb_dim) before the head.
    """

    causal = True
    comm: Communicator | None = None  # of the ranks that share this model
    compiled = "none"  # how, as `compile_model` knows it

    def __init__(
        self,
        config: CausalConfig,
        embedding: nn.Embedding,
        layers: Iterable[nn.Module],
        dec_norm: nn.Module,
        head: Head,
        rope: Rope | None = None,
        position_embedding: nn.Embedding | None = None,
        embedding_multiplier: float = 1.0,
        emb_dropout: float = 0.0,
        window: int | None = None,
    ):
        super().__init__()
        self.window = window  # of attention: how many tokens one sees, itself included; None: all before it
        self.config, self.rope, self.embedding_multiplier = config, rope, embedding_multiplier
        self.embedding = embedding
        self.position_embedding = position_embedding
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.layers = nn.ModuleList(layers)
        self.dec_norm = dec_norm
        self.head = head
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one parameter again, where the configuration says so: after anything that replaces
        parameters."""
        if self.config.tie_heads:
            self.head.register_parameter("weight", self.embedding._parameters["weight"])

    def compile_as(self, mode: str) -> None:
        """`compile_model(self, mode)`, unless it is compiled so."""
        if mode != self.compiled:
            compile_model(self, mode)

    def tp_plan(self, tp: int) -> Plan:
        plan = {"embedding": "embed", "emb_dropout": "dropout", "dec_norm": "last_norm", "head": "head"}
        return plan if self.position_embedding is None else plan | {"position_embedding": "scatter"}

    def make_cache(self, batch: int, max_len: int, slack: int = 0) -> StaticCache | RollingCache:
        """An empty cache for `batch` rows of at most `max_len` tokens; of a model with a window it holds the window.

        `slack` is room for the padding of rows that have ended while others go on.
        """
        self._check_length(max_len)
        weight, c = self.embedding.weight, self.config
        attn: Any = self.layers[0].attn
        kvheads = len(attn.key.weight) // c.head_dim  # of this rank
        group = len(attn.query.weight) // len(attn.key.weight)
        shape = (c.nlayers, kvheads, c.head_dim, weight.dtype, weight.device, group)
        if self.window is not None and self.window < max_len:
            return RollingCache(batch, max_len + slack, self.window, *shape)
        return StaticCache(batch, max_len + slack, *shape)

    def no_cache(self, span: int | Tensor) -> Recompute:
        """What stands for a cache when each pass starts anew; `span` as for a cache."""
        return Recompute(len(self.layers), span, self.embedding.weight.device, self.window)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        angles: Angles | None = None,
        last_n_tokens: int = 0,
    ) -> Tensor:
        """States after the last norm, (b, s, emb_dim), of token ids (b, s) or of embeddings (b, s, emb_dim); or of the
        last `last_n_tokens` positions only, for which a frozen last block computes no others.

        `mask`: True (or 0.0) where a query may look, broadcasting to (b, heads, s, kv) or of shape (b, s, kv); causal
        without one. `position_ids` (b or 1, s) default to the place in the sequence. `angles` are `rope`'s for them,
        from whoever has them already.
        """
        s = input_ids.shape[1]
        self._check_length(s)
        if cache is None:
            cache = self.no_cache(s)
        positions, implied = cache.advance(s)
        if position_ids is not None:
            positions = position_ids
        mask = implied if mask is None else mask[:, None] if mask.dim() == 3 else mask

        x = embedded(self, input_ids)
        if self.embedding_multiplier != 1:
            x = x * self.embedding_multiplier
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        x = self.emb_dropout(x)
        if angles is None and self.rope:
            angles = self.rope(positions, cache.span)
        fewer = 0 < last_n_tokens < s and self.compiled == "none"
        final = self.layers[-1] if fewer and isinstance(self.layers[-1], FrozenBlock) else None
        for block, layer in zip(self.layers, cache.layers, strict=True):
            x = block(x, angles, mask, layer, *([last_n_tokens] if block is final else ()))
        return self.dec_norm(x)[:, -last_n_tokens:]

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        angles: Angles | None = None,
        last_n_tokens: int = 0,
        local: bool = False,
    ) -> Tensor:
        """Logits (b, s, vocabulary), or of the last `last_n_tokens` positions only. Arguments as for `hidden`.

        `local`: those of this rank's share of the vocabulary, where several ranks hold the model.
        """
        h = self.hidden(
            input_ids, position_ids=position_ids, mask=mask, cache=cache, angles=angles, last_n_tokens=last_n_tokens
        )
        return self.head.local(h) if local else self.head(h)

    def reset_parameters(self) -> None:
        """Fill with random weights: normal of standard deviation 0.02, norms one, biases zero."""
        reset_parameters(self)

    def _check_length(self, n: int) -> None:
        if n > self.config.max_positions:
            raise ValueError(
                f"{n} positions are more than the {self.config.max_positions} that this model was made for "
                f"(max_expected_seq_len={self.config.max_expected_seq_len})"
            )
