#!/usr/bin/env python3
"""Scores a model on lm-eval's tasks with the flags of the existing FMS' script of this name; the same as `fms eval`."""

import sys

from fms.cli import evaluate, flags, guarded


def make_parser() -> flags.Parser:
    parser = flags.Parser(prog="eval_harness.py", description=(__doc__ or "").strip().splitlines()[0])
    evaluate.add_flags(parser)
    parser.add_argument("--model_source", dest="source", metavar="NAME", help="the same as --source")
    parser.add_argument("--distributed", action="store_true", help="has no effect: torchrun says it (default: not)")
    return parser


def main(words: list[str]) -> int:
    return guarded(lambda: evaluate.run(make_parser().parse_args(words)), "eval_harness.py", "--debug" in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
