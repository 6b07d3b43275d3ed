"""What the flags name: a model with its tokenizer, and how to choose tokens."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms.cli.flags import SAMPLING

if TYPE_CHECKING:
    from fms.utils.tokenizers import BaseTokenizer


@dataclass(frozen=True)
class Loaded:
    """A frozen model, its tokenizer, and the seconds that loading them took."""

    model: Any
    tokenizer: "BaseTokenizer"
    seconds: float

    @property
    def device(self) -> Any:
        return self.model.embedding.weight.device


def load(args: argparse.Namespace) -> Loaded:
    """The model and the tokenizer that the flags name."""
    if args.model_path is None and args.architecture is None:
        raise ValueError("which model? name its directory, .gguf file or Hub id (org/name): --model_path PATH")
    if args.model_path is None and args.tokenizer is None:
        raise ValueError("which weights? --model_path PATH; random ones have no tokenizer: --tokenizer PATH too")
    start = time.perf_counter()
    with shown("loading ..."):
        from fms.models import freeze, get_model
        from fms.models.compile import compile_model
        from fms.utils.serialization.checkpoint import local_path
        from fms.utils.tokenizers import get_tokenizer

        path = None if args.model_path is None else local_path(args.model_path)
        own = path.parent if path and path.is_file() and path.suffix != ".gguf" else path
        tokenizer = get_tokenizer(args.tokenizer or str(own))
        if args.chat_template is not None:
            tokenizer.chat_template = read_text(args.chat_template)
        model: Any = get_model(args.architecture, args.variant, path, args.source, args.device_type, args.dtype)
        compile_model(freeze(model), args.compile)
    if path is None:
        print("these are random weights: what follows means nothing", file=sys.stderr)
    return Loaded(model, tokenizer, time.perf_counter() - start)


@contextlib.contextmanager
def shown(text: str) -> Iterator[None]:
    """Words that stand on a terminal for as long as it takes."""
    if not sys.stderr.isatty():
        yield
        return
    print(text, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(" " * len(text), end="\r", file=sys.stderr, flush=True)


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `Run` takes of the flags. Raises `ValueError` before anything is loaded."""
    from fms.utils.sampling import Sampling

    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    drawn = sorted(given.keys() - {"do_sample", "repetition_penalty", "seed"})
    if given.get("do_sample") is False and drawn:
        raise ValueError(
            f"greedy (do_sample=false) draws nothing, and {drawn[0]} says how to draw: leave out one of them"
        )
    if "" in args.stop:
        raise ValueError("--stop '' would end every answer before it begins: give it a text")
    Sampling(**given)
    return given | {
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "use_cache": not args.no_cache,
    }


def read_text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from None
