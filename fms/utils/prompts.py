"""What goes into a generation, as rows of ids, and the form in which it comes out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fms.utils.tokenizers import BaseTokenizer


def rows_of(given: Any, tokenizer: BaseTokenizer | None) -> tuple[list[Tensor], Callable[..., Any]]:
    """Rows of ids, and what turns rows of prompt and new tokens into the form in which the prompt was given."""
    if isinstance(given, Tensor):
        if given.dim() not in (1, 2):
            raise ValueError(f"input_ids of shape {list(given.shape)} must have one or two dimensions")
        rows = list(given[None] if given.dim() == 1 else given)

        def as_tensor(run: Any, new: list[list[int]], pad: int) -> Tensor:
            width = max(map(len, new))
            tail = torch.tensor([row + [pad] * (width - len(row)) for row in new], device=given.device)
            whole = torch.cat((torch.stack(rows), tail), 1)
            return whole[0] if given.dim() == 1 else whole

        return rows, as_tensor
    if isinstance(given, str) or (len(given) and isinstance(given[0], str)):
        if tokenizer is None:
            raise ValueError("texts need a tokenizer: generate(model, texts, tokenizer=...)")
        texts = [given] if isinstance(given, str) else given

        def as_text(run: Any, new: list[list[int]], pad: int) -> Any:
            decoded = [run.text(row) for row in new]
            return decoded[0] if isinstance(given, str) else decoded

        return [torch.tensor(encode_prompt(tokenizer, text)) for text in texts], as_text

    rows = [torch.as_tensor(row) for row in given]

    def as_rows(run: Any, new: list[list[int]], pad: int) -> list[Tensor]:
        return [torch.cat((p, torch.tensor(n, dtype=p.dtype, device=p.device))) for p, n in zip(rows, new, strict=True)]

    return rows, as_rows


def encode_prompt(tokenizer: BaseTokenizer, text: str) -> list[int]:
    """The ids of a plain prompt, with the special tokens that begin one."""
    return tokenizer.encode(text, add_special_tokens=True)


def check_ids(prompts: Sequence[Tensor], vocabulary: int) -> None:
    """Raises `ValueError` for no prompt, an empty one, or one that is not ids of the vocabulary in one dimension."""
    if not prompts:
        raise ValueError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not prompt.numel():
            raise ValueError(f"prompt {i} is empty: it needs at least one token")
        if prompt.dim() != 1 or prompt.is_floating_point():
            raise ValueError(
                f"prompt {i} must be token ids in one dimension, it is {prompt.dtype} {list(prompt.shape)}"
            )
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"prompt {i} has token id {low if low < 0 else high}; the vocabulary is 0 to {vocabulary - 1}"
            )
