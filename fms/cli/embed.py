"""`fms embed`: vectors of texts, or a table of how alike they are."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from fms.cli.loading import load, read_text

if TYPE_CHECKING:
    from torch import Tensor


def run(args: argparse.Namespace) -> int:
    texts = read_texts(args.texts)
    if args.model_path is None:
        raise ValueError("which model? name its directory, file or Hub id (org/name): --model_path PATH")
    from dataclasses import replace

    from fms.utils.embedding import SIMILARITIES, Recipe, pool, read_recipe, token_rows
    from fms.utils.serialization.checkpoint import local_path

    path = local_path(args.model_path)
    recipe = read_recipe(path) if path.is_dir() else Recipe()
    if args.prompt_name is not None:
        recipe = replace(recipe, prompt=args.prompt_name)
    args.model_path = str(path / recipe.weights)
    loaded = load(args)
    rows = token_rows(loaded.model, loaded.tokenizer, texts, recipe)
    vectors = pool(loaded.model, rows, recipe, args.batch_size)
    if args.similarity:
        print_similarity(texts, SIMILARITIES[recipe.similarity](vectors), args.json)
        return 0
    for text, row, vector in zip(texts, rows, vectors.tolist(), strict=True):
        if args.json:
            print(json.dumps({"text": text, "tokens": len(row), "vector": vector}, ensure_ascii=False))
        else:
            print(" ".join(f"{x:.7g}" for x in vector))
    return 0


def print_similarity(texts: list[str], table: "Tensor", as_json: bool) -> None:
    """Of each text to each: numbered rows and columns."""
    if as_json:
        print(json.dumps({"texts": texts, "similarity": table.tolist()}, ensure_ascii=False))
        return
    width = len(str(len(texts)))
    print(" " * width, *(f"{i + 1:7}" for i in range(len(texts))))
    for i, (text, row) in enumerate(zip(texts, table.tolist(), strict=True), 1):
        shown = text if len(text) <= 60 else f"{text[:59]}…"
        print(f"{i:{width}}", *(f"{x:7.4f}" for x in row), "", shown)


def read_texts(given: list[str]) -> list[str]:
    """The texts themselves, or the lines of standard input for `-`; empty lines are passed over."""
    if given != ["-"] and (given or sys.stdin.isatty()):
        if not given:
            raise ValueError('there is no text: fms embed "a man is eating" --model_path ..., or - to type lines')
        return given
    texts = [line for line in read_text("-").splitlines() if line.strip()]
    if not texts:
        raise ValueError("standard input has no text: one a line is required")
    return texts
