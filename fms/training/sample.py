"""Text to look at while a model learns."""

from typing import Any

import torch


@torch.no_grad()
def continuation(root: Any, ids: list[int], limit: int, count: int = 48, temperature: float = 0.8) -> list[int]:
    """`count` ids that follow `ids`, drawn from an `LMLoss` as it is in training, the same ones for the same weights.

    All ranks call it. Without a cache, and of the last `limit` ids: for short samples.
    """
    device = next(root.parameters()).device
    draw = torch.Generator().manual_seed(0)
    text = list(ids)
    for _ in range(count):
        logits = root.next_logits(torch.tensor([text[-limit:]], device=device))[0]
        text.append(int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=draw)))
    return text[len(ids) :]
