"""The one bidirectional encoder. A family is a configuration and tables; a task is a head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fms.modules.attention import Attention
from fms.modules.block import EncoderBlock
from fms.modules.embedding import Embedding
from fms.modules.encoder_heads import ClassificationHead, MaskedLMHead, Pooler, SpanHead
from fms.modules.feedforward import FeedForward
from fms.modules.initial import reset_parameters
from fms.modules.tp import Communicator, Plan, embedded
from fms.utils.config import ModelConfig, check_values


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """The common vocabulary; the defaults are RoBERTa base's.

    `p_dropout` is that of embeddings and branches, `attn_dropout` that of attention weights. `position_after_pad`
    counts real tokens from pad_id + 1 and gives padding tokens the position pad_id (RoBERTa); else positions are
    places. `max_expected_seq_len` is how many tokens there may be, whatever their positions.
    """

    src_vocab_size: int = 50_265
    emb_dim: int = 768
    nheads: int = 12
    nlayers: int = 12
    hidden_dim: int = 3072
    norm_eps: float = 1e-5
    activation_fn: str = "gelu"
    max_expected_seq_len: int = 512
    position_after_pad: bool = True
    type_vocab_size: int = 1
    tie_heads: bool = True
    p_dropout: float = 0.1
    attn_dropout: float = 0.1
    pad_id: int | None = 1

    def __post_init__(self) -> None:
        sizes = ("src_vocab_size", "emb_dim", "nheads", "nlayers", "hidden_dim", "max_expected_seq_len")
        check_values(self, [*sizes, "type_vocab_size"])
        if self.emb_dim % self.nheads:
            raise ValueError(f"emb_dim={self.emb_dim} must be a multiple of nheads={self.nheads}")
        if self.position_after_pad and self.pad_id is None:
            raise ValueError("pad_id=None, and position_after_pad needs one to count from")

    @property
    def head_dim(self) -> int:
        return self.emb_dim // self.nheads

    @property
    def max_positions(self) -> int:
        return self.max_expected_seq_len

    @property
    def first_position(self) -> int:
        """That of the first token."""
        return self.pad_id + 1 if self.position_after_pad and self.pad_id is not None else 0


@dataclass(frozen=True)
class ClassificationConfig(EncoderConfig):
    """`labels` names the classes, or is empty. `head_dropout` is p_dropout where it is `None`."""

    num_classes: int = 2
    labels: tuple[str, ...] = ()
    head_dropout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", tuple(self.labels))
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1")
        if self.labels and len(self.labels) != self.num_classes:
            raise ValueError(f"labels names {len(self.labels)} classes, num_classes={self.num_classes}")


@dataclass(frozen=True)
class EmbeddingConfig(EncoderConfig):
    """`pooler`: there is one, which serves nothing here but to be kept."""

    pooler: bool = True


class Encoder(nn.Module):
    """Embeddings, post-norm blocks, a head.

    `model.hidden(input_ids)` gives the states (b, s, emb_dim); `model(input_ids)` what the head makes of them, or the
    states where there is none.
    """

    causal = False
    comm: Communicator | None = None  # of the ranks that share this model

    def __init__(self, config: EncoderConfig, head: nn.Module | None = None, pooler: Pooler | None = None):
        super().__init__()
        self.config = c = config
        rows, pad = c.first_position + c.max_expected_seq_len, c.pad_id if c.position_after_pad else None
        self.embedding = Embedding(c.src_vocab_size, c.emb_dim, padding_idx=c.pad_id)
        self.position_embedding = Embedding(rows, c.emb_dim, padding_idx=pad)
        self.token_type_embedding = Embedding(c.type_vocab_size, c.emb_dim)
        self.enc_norm = nn.LayerNorm(c.emb_dim, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.p_dropout)

        def block() -> EncoderBlock:
            ln, ff_ln = (nn.LayerNorm(c.emb_dim, eps=c.norm_eps) for _ in range(2))
            attn = Attention(c.emb_dim, c.nheads, c.nheads, c.head_dim, bias=True, dropout=c.attn_dropout, causal=False)
            return EncoderBlock(attn, ln, FeedForward(c.emb_dim, c.hidden_dim, c.activation_fn), ff_ln, c.p_dropout)

        self.layers = nn.ModuleList([block() for _ in range(c.nlayers)])
        self.head, self.pooler = head, pooler
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make a masked-LM head and the embedding one parameter again, where the configuration says so."""
        if self.config.tie_heads and isinstance(self.head, MaskedLMHead):
            self.head.out.register_parameter("weight", self.embedding._parameters["weight"])

    def tp_plan(self, tp: int) -> Plan:
        plan = {"embedding": "embed", "position_embedding": "scatter", "token_type_embedding": "scatter"}
        return plan | {"enc_norm": "norm", "dropout": "dropout", f"layers.{len(self.layers) - 1}.ff_ln": "last_norm"}

    def hidden(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """States of the last block, (b, s, emb_dim), of token ids (b, s) or of embeddings (b, s, emb_dim).

        `mask`: (b, s), not 0 where there is a token and 0 where there is padding; or True (or 0.0) where a query may
        look, of shape (b, s, kv) or broadcasting to (b, heads, s, kv). Without one all look at all, padding included.
        `token_type_ids` (b or 1, s) default to 0, `position_ids` (b or 1, s) to what the configuration says.
        """
        s, limit = input_ids.shape[1], self.config.max_expected_seq_len
        if s > limit:
            raise ValueError(f"{s} tokens are more than the max_expected_seq_len={limit} that this model was made for")
        positions = self._positions(input_ids) if position_ids is None else position_ids
        types = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
        if mask is not None and mask.dim() < 4:
            mask = mask[:, None, None].bool() if mask.dim() == 2 else mask[:, None]

        x = embedded(self, input_ids)
        x = x + self.token_type_embedding(types) + self.position_embedding(positions)
        x = self.dropout(self.enc_norm(x))
        for block in self.layers:
            x = block(x, mask)
        return x

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Any:
        """The head's logits; arguments as for `hidden`. A question-answering head gives two: start, end."""
        h = self.hidden(input_ids, position_ids=position_ids, token_type_ids=token_type_ids, mask=mask)
        return h if self.head is None else self.head(h)

    def reset_parameters(self) -> None:
        """Fill with random weights: normal of standard deviation 0.02, norms one, biases zero."""
        reset_parameters(self)

    def _positions(self, input_ids: Tensor) -> Tensor:
        """Embeddings do not tell which of them are padding: they count as real."""
        c = self.config
        if c.position_after_pad and c.pad_id is not None and not input_ids.is_floating_point():
            real = input_ids.ne(c.pad_id)
            return real.cumsum(1) * real + c.pad_id
        return torch.arange(c.first_position, c.first_position + input_ids.shape[1], device=input_ids.device)[None]


def masked_lm(config: EncoderConfig, activation: str | None = None, /, **overrides: Any) -> Encoder:
    """`activation` is the head's, that of the blocks where it is `None`."""
    c = config.updated(**overrides)
    return Encoder(c, MaskedLMHead(c.emb_dim, c.src_vocab_size, activation or c.activation_fn, c.norm_eps))


def classifier(config: ClassificationConfig, drop_input: bool, /, **overrides: Any) -> Encoder:
    c = config.updated(**overrides)
    dropout = c.p_dropout if c.head_dropout is None else c.head_dropout
    return Encoder(c, ClassificationHead(c.emb_dim, c.num_classes, dropout, drop_input))


def question_answering(config: EncoderConfig, /, **overrides: Any) -> Encoder:
    c = config.updated(**overrides)
    return Encoder(c, SpanHead(c.emb_dim))


def embedding_model(config: EmbeddingConfig, /, **overrides: Any) -> Encoder:
    c = config.updated(**overrides)
    return Encoder(c, pooler=Pooler(c.emb_dim) if c.pooler else None)
