"""Objectives: the next token, and masked words."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fms.utils.labels import IGNORED


def causal_loss(model: Any, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in fp32, of each token (b, s) given those before it.

    `labels` (b, s), the ids themselves by default, say which count: those that are not `IGNORED`.
    """
    labels = input_ids if labels is None else labels
    logits = model(input_ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def mask_tokens(
    input_ids: Tensor,
    mask_id: int,
    vocab_size: int,
    special_ids: Collection[int] = (),
    rate: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What a masked language model is shown and what it has to find, (b, s) each (Devlin 2018, arXiv 1810.04805).

    Of the tokens that are not special a share `rate` is to be found: 80 % of them are shown as `mask_id`, 10 % as a
    random token, 10 % as they are. Labels elsewhere are `IGNORED`. Raises `ValueError` for a rate outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate={rate} must lie in (0, 1]")
    device = input_ids.device

    def draw() -> Tensor:
        return torch.rand(input_ids.shape, generator=generator, device=device)

    special = torch.isin(input_ids, torch.tensor(sorted(special_ids), dtype=input_ids.dtype, device=device))
    chosen = (draw() < rate) & ~special
    how = draw()
    others = torch.randint(vocab_size, input_ids.shape, generator=generator, device=device)
    shown = torch.where(chosen & (how < 0.8), mask_id, input_ids)
    shown = torch.where(chosen & (how >= 0.9), others, shown)
    return shown, torch.where(chosen, input_ids, IGNORED)


def masked_lm_loss(model: Any, shown: Tensor, labels: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """Mean cross-entropy, in fp32, of the tokens (b, s) to be found; `mask` (b, s) is 0 where there is padding.

    0 if nothing is to be found. `inputs` are further arguments of the model, as `token_type_ids`.
    """
    logits = model(shown, mask=mask, **inputs)
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)
