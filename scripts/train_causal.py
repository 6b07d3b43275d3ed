#!/usr/bin/env python3
"""Trains or tunes a causal model with the flags of the existing FMS' script of this name.

`fms train` is the command with words of our own; this script is for set-ups that call it by these flags. It takes those
of `fms train` too.
"""

import argparse
import sys

from fms.cli import flags, guarded, train

# theirs: ours
RENAMED = {
    "--checkpoint_format": "source",
    "--default_dtype": "dtype",
    "--dataset_style": "dataset",
    "--max_data_sequence_length": "seq_len",
    "--grad_accum_steps": "accumulate",
    "--output_path": "output",
}
DEFAULTS = {
    "architecture": "llama",
    "tokenizer": "char_tokenizer",
    "dataset": "instruction",
    "lr": 1e-4,
}


def make_parser() -> flags.Parser:
    parser = flags.Parser(prog="train_causal.py", description=(__doc__ or "").strip().splitlines()[0])
    train.add_flags(parser)
    theirs = parser.add_argument_group("flags of the existing script")
    for name, ours in RENAMED.items():
        theirs.add_argument(name, dest=ours, type=int if ours in ("seq_len", "accumulate") else flags.path)
    theirs.add_argument("--compile_model", dest="compile", action="store_const", const="blocks", help="blocks")
    theirs.add_argument("--peft_method", choices=["lora"], help="--lora 16")
    theirs.add_argument("--unfuse_weights", action="store_true", help="has no effect: weights are stored unfused")
    return parser


def main(words: list[str]) -> int:
    return guarded(lambda: run(make_parser().parse_args(words)), "train_causal.py", "--debug" in words)


def run(args: argparse.Namespace) -> int:
    if args.unfuse_weights:
        print("train_causal.py: --unfuse_weights has no effect", file=sys.stderr)
    if args.peft_method and args.lora is None:
        args.lora = 16
    if args.dtype in ("bfloat16", "float32"):
        args.dtype = {"bfloat16": "bf16", "float32": "fp32"}[args.dtype]
    if args.model_path is not None and args.architecture is None:
        DEFAULTS.pop("architecture")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None and not args.config:
            setattr(args, name, value)
    return train.run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
