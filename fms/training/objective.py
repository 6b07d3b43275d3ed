"""What is trained: a model with its loss, one module, as FSDP wants its root."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fms.training.cross_entropy import head_loss, is_projection
from fms.training.loss import IGNORED, mask_tokens

OBJECTIVES = ("causal", "masked")
Batch = dict[str, Tensor]


class LMLoss(nn.Module):
    """`root(batch)` is the sum of the cross-entropy over the labels of a batch, which `count` counts.

    A batch has `input_ids` and `labels` (b, s), `IGNORED` where they do not count. It may have `position_ids` and
    `mask`, which go to the model, or `document_ids` (b, s), across which nothing is seen. With the objective "causal"
    each position predicts the next one's label, with "masked" its own. Raises `ValueError` for an objective or a head
    that the model is not made for.
    """

    def __init__(self, model: Any, objective: str = "causal"):
        super().__init__()
        if model.causal != (objective == "causal"):
            kind = "a decoder, which" if model.causal else "an encoder, which"
            raise ValueError(f"objective={objective!r}: this is {kind} learns by {OBJECTIVES[not model.causal]!r}")
        if not model.causal and not hasattr(getattr(model.head, "out", None), "scaling"):
            raise ValueError(
                "objective='masked' needs a head over the vocabulary, this model's is for another task: "
                "take the architecture without _classification, _question_answering or _embedding"
            )
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in ("position_ids", "mask") if name in batch}
        if "document_ids" in batch:
            inputs["mask"] = within_documents(batch["document_ids"], self.model.causal)
        h = self.model.hidden(batch["input_ids"], **inputs)
        head, labels = self.model.head, self.labels(batch)
        if self.model.causal:
            loss = lambda h, head: head_loss(h, head, labels)
            return head(h, loss) if is_projection(head) else loss(h, head)
        return head_loss(head.ln(head.activation(head.dense(h))), head.out, labels)

    def labels(self, batch: Batch) -> Tensor:
        """What each position has to predict, (b, s)."""
        labels = batch["labels"]
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.model.causal else labels

    def count(self, batch: Batch) -> Tensor:
        """How many labels count, as a float on their device."""
        return (self.labels(batch) != IGNORED).sum().float()

    def next_logits(self, input_ids: Tensor) -> Tensor:
        """Of the token after each row, (b, vocabulary)."""
        return self.model.head(self.model.hidden(input_ids)[:, -1:])[:, -1].float()


def within_documents(document_ids: Tensor, causal: bool) -> Tensor:
    """True where a token may look: in its own document, (b, s, s)."""
    same = document_ids[:, :, None] == document_ids[:, None]
    return same.tril() if causal else same


class Masking:
    """Hides tokens of a batch as `mask_tokens` does. The same seed hides the same ones."""

    def __init__(self, mask_id: int, vocab_size: int, special_ids: Collection[int] = (), rate: float = 0.15):
        self.mask_id, self.vocab_size, self.special_ids, self.rate = mask_id, vocab_size, special_ids, rate

    def __call__(self, batch: Batch, seed: int) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        shown, labels = mask_tokens(
            batch["input_ids"], self.mask_id, self.vocab_size, self.special_ids, self.rate, generator=draw
        )
        return batch | {"input_ids": shown, "labels": labels.where(batch["labels"] != IGNORED, IGNORED)}
