#!/usr/bin/env python3
"""Measures inference with the flags of the existing FMS' script of this name; the same as `fms benchmark`."""

import sys

from fms.cli import benchmark, flags, guarded


def make_parser() -> flags.Parser:
    parser = flags.Parser(prog="benchmark_inference.py", description=(__doc__ or "").strip().splitlines()[0])
    benchmark.add_flags(parser)
    return parser


def main(words: list[str]) -> int:
    return guarded(lambda: benchmark.run(make_parser().parse_args(words)), "benchmark_inference.py", "--debug" in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
