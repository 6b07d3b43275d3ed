"""The `fms` command: parses, runs one command, and says in one line what went wrong."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

from fms.cli import benchmark, chat, checkpoints, embed, evaluate, flags, generate, plan, plot, tokenize, train

Command = Callable[[argparse.Namespace], int]
COMMANDS: dict[str, Command] = {
    "generate": generate.run,
    "chat": chat.run,
    "embed": embed.run,
    "benchmark": benchmark.run,
    "eval": evaluate.run,
    "train": train.run,
    "plot": plot.run,
    "plan": plan.plan,
    "models": checkpoints.models,
    "convert": checkpoints.convert,
    "validate": checkpoints.validate,
    "tokenize": tokenize.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 for a checkpoint with problems; 2 for an error; 130 after Ctrl-C; 141 if nobody reads on."""
    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        parser = flags.make_parser()
        if words and not words[0].startswith("-"):
            flags.check_command(parser, words[0], COMMANDS)
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help(sys.stderr)
            return 2
        return COMMANDS[args.command](args)

    return guarded(run, "fms", "--debug" in words)


def guarded(run: Callable[[], int], name: str, debug: bool) -> int:
    """Run a program. What a user can cause becomes one line on standard error and code 2; a traceback with `debug`."""
    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        if debug or (isinstance(error, RuntimeError) and not _is_out_of_memory(error)):
            raise
        print(f"{name}: error: {message(error)}", file=sys.stderr)
        return 2


def message(error: Exception) -> str:
    if isinstance(error, KeyError):
        return str(error.args[0])
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError):
        first = str(error).splitlines()[0]
        return f"out of memory: {first} (a smaller --dtype, --batch_size or --max_new_tokens takes less)"
    return str(error) or type(error).__name__


def _is_out_of_memory(error: RuntimeError) -> bool:
    from fms.utils.devices import is_out_of_memory

    return is_out_of_memory(error)
