#!/usr/bin/env python3
"""Finds the answer to a question in a text: the span whose first and last token fit best together.

python examples/question_answering.py DIRECTORY "Where is Paris?" "Paris is a city in France."
"""

import sys

import torch
from transformers import AutoTokenizer

from fms.models import get_model
from fms.models.hf import to_hf_api

LONGEST = 30  # tokens of an answer


@torch.inference_mode()
def answer(directory: str, question: str, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = to_hf_api(get_model(model_path=directory))
    inputs = tokenizer(question, text, return_tensors="pt", return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")[0]
    context = torch.tensor([part == 1 for part in inputs.sequence_ids()])  # not the question, not special tokens

    output = model(**inputs)
    start, end = (x[0].masked_fill(~context, -torch.inf) for x in (output.start_logits, output.end_logits))
    scores = start[:, None] + end[None]  # of each first and each last token
    length = torch.ones_like(scores, dtype=torch.bool)
    scores = scores.masked_fill(~(length.triu() & length.tril(LONGEST - 1)), -torch.inf)
    first, last = divmod(int(scores.argmax()), len(end))
    return text[offsets[first][0] : offsets[last][1]]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    print(answer(*sys.argv[1:]))
