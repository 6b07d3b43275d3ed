#!/usr/bin/env python3
"""Answers two questions, or sums up a file, with the flags of the existing FMS' script of this name.

`fms generate` is the command for prompts of your own; this script is for set-ups that call it by these flags.
"""

import argparse
import os
import sys
from pathlib import Path

from fms.cli import flags, generate, guarded
from fms.cli.loading import load

QUESTIONS = [
    "How do I make a chicken soup? Give the steps in order.",
    "Which greetings are common in Spanish, and when does one use each of them?",
]


def make_parser() -> flags.Parser:
    parser = flags.Parser(prog="inference.py", description=(__doc__ or "").strip().splitlines()[0])
    add = parser.add_argument
    flags.add_device(parser)
    add("--architecture", help="as `fms models` lists them (default: what the weights say; llama without weights)")
    add("--variant", help="as `fms models` lists them (default: what the weights say)")
    add("--model_path", type=flags.path, help="directory, file or Hub id of the weights (default: random weights)")
    add("--model_source", dest="source", help="format of the weights: hf, meta, gguf, fms, own (default: found out)")
    add("--tokenizer", type=flags.path, help="file, directory or Hub id (default: the one beside the weights)")
    add("--no_use_cache", action="store_true", help="compute everything anew for each token (default: use a cache)")
    add("--unfuse_weights", action="store_true", help="has no effect: weights are stored unfused, inference fuses them")
    add("--default_dtype", dest="dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (default: their own)")
    add("--compile", dest="compiled", action="store_true", help="compile the model with torch.compile (default: not)")
    modes = ["default", "reduce-overhead", "max-autotune"]
    add("--compile_mode", choices=modes, default="default", help="torch.compile's mode (default: default)")
    add("--deterministic", action="store_true", help="deterministic algorithms only, seed 42 (default: not)")
    add("--distributed", action="store_true", help="split the model over the processes that torchrun started")
    add("--batch_input", action="store_true", help="both questions in one batch (default: one after the other)")
    add(
        "--min_pad_length",
        type=int,
        default=0,
        help="has no effect: padding changes no answer here (default: 0 tokens)",
    )
    add("--attn_name", choices=["sdpa_causal"], default="sdpa_causal", help="the attention (default: sdpa_causal)")
    add("--context_file", type=flags.path, help="sum up this text file (default: answer two questions)")
    add("--max_new_tokens", type=flags.count, default=100, help="tokens of an answer at most (default: 100)")
    flags.add_debug(parser)
    parser.set_defaults(chat_template=None)
    return parser


def main(words: list[str]) -> int:
    return guarded(lambda: run(make_parser().parse_args(words)), "inference.py", "--debug" in words)


def run(args: argparse.Namespace) -> int:
    import torch

    if args.distributed and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ValueError("--distributed needs several processes: start with torchrun")
    if args.compile_mode != "default" and not args.compiled:
        raise ValueError(f"--compile_mode={args.compile_mode} needs --compile")
    for flag in ("unfuse_weights", "min_pad_length"):
        if getattr(args, flag):
            print(f"inference.py: --{flag} has no effect", file=sys.stderr)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(42)
    if args.model_path is None and args.architecture is None:
        args.architecture = "llama"
    prompts = QUESTIONS
    if args.context_file is not None:
        prompts = [f"Sum up this text in a few sentences.\n\n{Path(args.context_file).read_text(encoding='utf-8')}"]
    args.compile = args.compile_mode if args.compiled else "none"
    loaded = load(args)
    ids = [ask(loaded.tokenizer, prompt) for prompt in prompts]
    options = {"max_new_tokens": args.max_new_tokens, "use_cache": not args.no_use_cache, "do_sample": False}
    print(f"use_cache {not args.no_use_cache};; do_sample False")
    size = len(prompts) if args.batch_input else 1
    for first in range(0, len(prompts), size):
        rows = slice(first, first + size)
        answers, _ = generate.answer_together(loaded, prompts[rows], ids[rows], options, first)
        for answer in answers:
            print(f"==========\n{answer.prompt}\n----------\n{answer.text}", flush=True)
    return 0


def ask(tokenizer, prompt: str) -> list[int]:
    """The ids of a question: by the chat template, or as an instruction where there is none."""
    chat = tokenizer.chat_template is not None
    return generate.encode(tokenizer, prompt if chat else f"Instruction:\n{prompt}\n\nResponse:\n", chat, None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
