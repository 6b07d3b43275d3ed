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
    "batch_size": 2,
    "lr": 1e-4,
}
EPOCHS = 2.0
# these change nothing here, and why
WITHOUT_EFFECT = {
    "--unfuse_weights": "weights are stored unfused",
    "--run_validation": "the held-out loss is always computed at the end",
    "--compile_optimizer": "AdamW is fused",
    "--compile_static": "training has few shapes",
}


def make_parser() -> flags.Parser:
    parser = flags.Parser(prog="train_causal.py", description=(__doc__ or "").strip().splitlines()[0])
    train.add_flags(parser)
    theirs = parser.add_argument_group("flags of the existing script")
    for name, ours in RENAMED.items():
        theirs.add_argument(name, dest=ours, type=int if ours in ("seq_len", "accumulate") else flags.path)
    theirs.add_argument("--compile_model", dest="compile", action="store_const", const="blocks", help="blocks")
    theirs.add_argument("--peft_method", choices=["lora"], help="--lora 16")
    theirs.add_argument("--training_type", choices=["causal"], help="causal, the only one")
    theirs.add_argument("--optimizer", choices=["adamw"], help="adamw, the only one")
    theirs.add_argument("--compile_backend", choices=["inductor"], help="inductor, the only one")
    theirs.add_argument("--pad_token_id", type=int, help="has no effect: padding is not learnt")
    for name, why in WITHOUT_EFFECT.items():
        theirs.add_argument(name, action="store_true", help=f"has no effect: {why}")
    return parser


def main(words: list[str]) -> int:
    return guarded(lambda: run(make_parser().parse_args(words)), "train_causal.py", "--debug" in words)


def run(args: argparse.Namespace) -> int:
    for name, why in WITHOUT_EFFECT.items():
        if getattr(args, name[2:]):
            print(f"train_causal.py: {name} has no effect: {why}", file=sys.stderr)
    if args.peft_method and args.lora is None:
        args.lora = 16
    if args.dtype in ("bfloat16", "float32"):
        args.dtype = {"bfloat16": "bf16", "float32": "fp32"}[args.dtype]
    if not args.config:
        own = ("architecture", "tokenizer") if args.model_path is not None and args.architecture is None else ()
        for name, value in DEFAULTS.items():
            if getattr(args, name) is None and name not in own:
                setattr(args, name, value)
        if args.steps is None and args.epochs is None:
            args.epochs = EPOCHS
    return train.run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
