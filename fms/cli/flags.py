"""The words that the `fms` command takes. Stands on the standard library alone, so that `--help` comes at once."""

import argparse
import os
from collections.abc import Iterable
from typing import Any, NoReturn

from fms import __version__

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
OWN_DEFAULT = "default: what the model's generation_config.json says, else"


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; its errors are one line, and one about an unknown flag names the nearest."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, extra = super().parse_known_args(args, namespace)
        if flag := next((word for word in extra if word.startswith("-")), ""):
            flag = flag.partition("=")[0]
            self.error(f"there is no flag {flag}{nearest(flag, self._option_string_actions)}")
        if extra:
            self.error(f"too many words, from {extra[0]!r} on: put quotes around those that belong together")
        return found, extra

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: error: {message} ({self.prog} --help says more)\n")


def check_command(parser: Parser, word: str, known: Iterable[str]) -> None:
    if word not in known:
        parser.error(f"there is no command {word!r}{nearest(word, known)}; there are {', '.join(known)}")


def make_parser() -> Parser:
    parser = Parser(
        prog="fms", description="Foundation models in PyTorch: generate text, chat, look after checkpoints."
    )
    parser.add_argument("--version", action="version", version=f"fms {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    def command(name: str, text: str, example: str) -> Parser:
        made = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: fms {name} {example}",
        )
        assert isinstance(made, Parser)
        return made

    generate = command("generate", "continue a prompt", '"The capital of France is" --model_path DIRECTORY')
    add_prompts(generate)
    add_model(generate)
    add_sampling(generate)
    generate.add_argument(
        "--no_cache", action="store_true", help="compute everything anew for each token (default: keep keys and values)"
    )
    add_debug(generate)

    chat = command("chat", "talk with a model", "--model_path DIRECTORY")
    add_model(chat)
    add_template(chat)
    add_sampling(chat, max_new_tokens="512")
    chat.set_defaults(no_cache=False)
    chat.add_argument(
        "--stats", action="store_true", help="after each answer its speed, on standard error (default: none)"
    )
    add_debug(chat)

    embed = command(
        "embed",
        "print vectors of texts, or how alike they are",
        '"a man eats" "a meal" --similarity --model_path DIRECTORY',
    )
    add_texts(embed)
    add_model(embed)
    embed.set_defaults(chat_template=None)
    add_debug(embed)

    from fms.cli.benchmark import add_flags  # which stands on this module

    add_flags(
        command("benchmark", "measure time a token and memory", "--architecture llama --variant 7b --seq_len 512")
    )

    from fms.cli import plot, train

    train.add_flags(
        command("train", "train or tune a model", "--model_path DIRECTORY --dataset_path FILE.txt --output RUN")
    )
    plot.add_flags(command("plot", "draw loss and speed of training runs", "RUN --out run.png"))

    from fms.cli import evaluate

    evaluate.add_flags(command("eval", "score a model on tasks or a text", "--text notes.txt --model_path DIRECTORY"))

    plan = command("plan", "show how a model is split over ranks", "llama 2-7b --tp 4")
    plan.add_argument("architecture", metavar="ARCHITECTURE", help="as `fms models` lists them")
    plan.add_argument("variant", metavar="VARIANT", help="as `fms models` lists them")
    plan.add_argument("--tp", type=int, default=2, metavar="N", help="ranks that share the model (default: 2)")
    plan.add_argument("--dtype", default="bf16", metavar="NAME", help="of the weights (default: bf16)")
    add_debug(plan)

    models = command("models", "list what models there are", "llama")
    models.add_argument("architecture", nargs="?", metavar="ARCHITECTURE", help="only this one (default: all)")
    models.add_argument("--json", action="store_true", help="as JSON (default: a table)")
    add_debug(models)

    convert = command("convert", "write a checkpoint in another format", "model.gguf DIRECTORY --to hf")
    convert.add_argument("model_path", type=path, metavar="IN", help="directory, file or Hub id")
    convert.add_argument("out", type=path, metavar="OUT", help="the directory to write")
    convert.add_argument(
        "--to",
        required=True,
        choices=["hf", "meta", "fms", "own"],
        help="the format: Hugging Face, Meta, the existing FMS, our own",
    )
    add_identity(convert)
    convert.add_argument("--dtype", metavar="NAME", help="fp32, bf16 or fp16 (default: as it is; GGUF: fp32)")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it is there (default: an error)")
    add_debug(convert)

    validate = command("validate", "say what is wrong with a checkpoint; exit code 1 if anything is", "DIRECTORY")
    validate.add_argument("model_path", type=path, metavar="PATH", help="directory, file or Hub id")
    add_identity(validate)
    add_debug(validate)

    from fms.cli import tokenize

    tokenize.add_flags(command("tokenize", "make shards of tokens out of text", "TEXTS SHARDS --tokenizer DIRECTORY"))
    return parser


def add_prompts(parser: Parser) -> None:
    given = parser.add_argument_group("prompt")
    given.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the text; - for standard input, -- before one that begins with a dash",
    )
    given.add_argument("--file", type=path, metavar="FILE", help="take the prompt from this file")
    given.add_argument(
        "--batch",
        type=path,
        metavar="FILE",
        help='many prompts: one a line, or JSON lines that have a "prompt"; - for standard input',
    )
    given.add_argument(
        "--batch_size", type=count, default=8, metavar="N", help="prompts of a batch that run together (default: 8)"
    )
    given.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template (default: as it is)"
    )
    add_template(given)
    shown = parser.add_argument_group("output")
    shown.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a prompt: text, counts of tokens, seconds (default: the text, as it comes)",
    )
    shown.add_argument("--stats", action="store_true", help="then speed and memory, on standard error (default: none)")


def add_texts(parser: Parser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="the texts; - for the lines of standard input")
    parser.add_argument(
        "--similarity", action="store_true", help="how alike they are, as a table (default: each text's vector, a line)"
    )
    parser.add_argument(
        "--json", action="store_true", help="as JSON: an object a text, or one for the table (default: plain numbers)"
    )
    parser.add_argument(
        "--prompt_name", metavar="NAME", help="which of the model's prompts the texts begin with (default: its own)"
    )
    parser.add_argument(
        "--batch_size", type=count, default=32, metavar="N", help="texts that run together (default: 32)"
    )


def add_template(parser: Any) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the system message of the chat (default: the template's own)")
    parser.add_argument(
        "--chat_template", type=path, metavar="FILE", help="a Jinja chat template (default: the tokenizer's)"
    )


def add_identity(parser: Any) -> None:
    parser.add_argument(
        "--source", metavar="NAME", help="format of the weights: hf, meta, gguf, fms, own (default: found out)"
    )
    parser.add_argument("--architecture", metavar="NAME", help="as `fms models` lists them (default: found out)")
    parser.add_argument("--variant", metavar="NAME", help="as `fms models` lists them (default: the weights' own)")


def add_model(parser: Parser) -> None:
    model = add_weights(parser, tokenizer="the one beside the weights")
    model.add_argument(
        "--dtype",
        metavar="NAME",
        help="fp32, bf16 or fp16 (default: the weights' own; GGUF: fp32 on a CPU, bf16 on a GPU)",
    )
    add_compile(model, "none")


def add_weights(parser: Parser, tokenizer: str) -> Any:
    """The group of flags that name a model; `tokenizer` is the default of that flag, in words."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_path",
        type=path,
        metavar="PATH",
        help="directory, file or Hub id (org/name) of the weights; none: random weights",
    )
    add_identity(model)
    model.add_argument(
        "--tokenizer",
        type=path,
        metavar="PATH",
        help=f"file, directory, Hub id or char_tokenizer (default: {tokenizer})",
    )
    add_device(model)
    return model


def add_compile(parser: Any, default: str | None, words: str = "none") -> None:
    parser.add_argument(
        "--compile",
        choices=["none", "blocks", "max"],
        default=default,
        help="torch.compile of the block that all layers share; max: slower to start, kernels chosen by measuring "
        f"(default: {words})",
    )


def add_device(parser: Any) -> None:
    parser.add_argument(
        "--device_type", default="auto", metavar="NAME", help="cpu, cuda or auto: a GPU if there is one (default: auto)"
    )


def add_sampling(parser: Parser, max_new_tokens: str = "") -> None:
    how = parser.add_argument_group("choice of tokens")
    how.add_argument(
        "--max_new_tokens",
        type=count,
        default=int(max_new_tokens) if max_new_tokens else None,
        metavar="N",
        help=f"tokens at most ({f'default: {max_new_tokens}' if max_new_tokens else f'{OWN_DEFAULT} 256'})",
    )
    draw = how.add_mutually_exclusive_group()
    draw.add_argument(
        "--do_sample",
        action="store_true",
        default=None,
        help=f"draw tokens at random ({OWN_DEFAULT} greedy; implied by temperature, top_k, top_p, min_p, seed)",
    )
    draw.add_argument(
        "--greedy", dest="do_sample", action="store_false", default=None, help="always the likeliest token"
    )
    how.add_argument(
        "--temperature", type=float, metavar="T", help=f"divides the logits; 0 is greedy ({OWN_DEFAULT} 1)"
    )
    how.add_argument("--top_k", type=int, metavar="K", help=f"only the K likeliest tokens; 0: all ({OWN_DEFAULT} all)")
    how.add_argument(
        "--top_p", type=float, metavar="P", help=f"only the likeliest that make up this probability ({OWN_DEFAULT} 1)"
    )
    how.add_argument(
        "--min_p",
        type=float,
        metavar="P",
        help=f"only those at least this share as likely as the likeliest ({OWN_DEFAULT} 0)",
    )
    how.add_argument(
        "--repetition_penalty",
        type=float,
        metavar="X",
        help=f"over 1 makes tokens that were there less likely ({OWN_DEFAULT} 1)",
    )
    how.add_argument(
        "--seed", type=int, metavar="N", help="of the draws; the same seed draws the same text (default: 0)"
    )
    how.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given again (default: the end-of-text token only)",
    )


def add_debug(parser: Parser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: its message)")


def path(text: str) -> str:
    """A path or a name, with `~` expanded also where no shell does it: `--model_path=~/x`."""
    return os.path.expanduser(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def nearest(word: str, known: Iterable[str]) -> str:
    from fms.utils.serialization import errors

    return errors.nearest(word, known)
