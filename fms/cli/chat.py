"""`fms chat`: a conversation whose cache is continued, never computed again."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from fms.cli.flags import count, nearest
from fms.cli.generate import Answer, Recorded, finish_reason
from fms.cli.loading import Loaded, load, run_options


class Conversation:
    """The history of a chat, and the cache of what of it the model has seen.

    Each turn is the chat template of the whole history; the cache goes back to where that differs from what it holds
    (after the last answer, as a rule), and only the rest is computed.
    """

    def __init__(self, loaded: Loaded, system: str | None = None):
        from fms.utils.tensors import GrowingCache

        self.loaded = loaded
        config = loaded.model.config
        self.limit: int = config.max_positions
        scaling = config.rope_scaling
        dynamic = (
            scaling is not None and scaling.kind == "dynamic"
        )  # frequencies depend on the length: it must be fixed
        cache = (
            loaded.model.make_cache(1, self.limit) if dynamic else GrowingCache(config.nlayers, device=loaded.device)
        )
        self.cache: Any = cache
        self.system = system
        self.messages: list[dict[str, str]] = []  # the turns, without the system message
        self.held: list[int] = []  # the ids in the cache
        self.last: tuple[Answer, Any] | None = None  # the last whole answer, and its timing

    def history(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.messages]

    def ids(self) -> list[int]:
        return self.loaded.tokenizer.apply_chat_template(self.history())

    def ask(self, text: str, room: int) -> int:
        """Add a message of the user. Returns how many old turns had to go for it and an answer of `room` tokens.

        When the context is full all but its newer half goes, so that this does not happen again each turn.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            if len(self.ids()) + min(room, self.limit // 4) > self.limit:
                while len(self.messages) > 1 and len(self.ids()) > self.limit // 2:
                    del self.messages[:2]
            if (n := len(self.ids())) >= self.limit:
                raise ValueError(f"the message makes {n} tokens, and the model's context has {self.limit}: shorten it")
        except (ValueError, KeyboardInterrupt):
            self.messages = before
            raise
        return (len(before) + 1 - len(self.messages)) // 2

    def answer(self, **options: Any) -> Generator[str, None, None]:
        """The model's answer as it comes. It is part of the history as far as it came, even if the iterator is closed.

        Without a single token of it the message goes back too.
        """
        import torch

        from fms.utils.generation import Run, stream_run

        self.last = None
        run: Any = None
        text, tokenizer = "", self.loaded.tokenizer
        try:
            ids = self.ids()
            keep = min(common_prefix(self.held, ids), len(ids) - 1)
            self.held = ids[:keep]
            self.cache.rewind([keep])
            inner = Run(self.loaded.model, [torch.tensor(ids[keep:])], tokenizer=tokenizer, cache=self.cache, **options)
            run = Recorded(inner)
            for piece in stream_run(run, tokenizer):
                text += piece
                yield piece
        finally:
            if run is not None and run.ids:
                self.held = [*ids, *run.ids[:-1]]  # the last was never fed
                self.messages.append({"role": "assistant", "content": text})
            else:
                self.messages.pop()
            self.cache.rewind([len(self.held)])  # an interrupted pass may have left more in some layers
        reason = finish_reason(run.ids, inner, tokenizer)
        self.last = Answer(self.messages[-2]["content"], text, len(ids) - keep, len(run.ids), reason), inner.timing


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def run(args: argparse.Namespace) -> int:
    run_options(args)  # what is wrong with them is said before anything is loaded
    loaded = load(args)
    if loaded.tokenizer.chat_template is None:
        raise ValueError("this model has no chat template: use an instruction-tuned one, or give --chat_template FILE")
    Terminal(Conversation(loaded, args.system), args).run()
    return 0


def truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": count,
    "do_sample": truth,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "stop": lambda text: [text],
}


class Terminal:
    """Reads lines: messages, or commands that begin with a slash. Answers go to standard output, notes to the other."""

    def __init__(self, conversation: Conversation, args: argparse.Namespace):
        self.conversation, self.args, self.options = conversation, args, run_options(args)
        self.saved: set[Path] = set()
        self.commands: dict[str, Callable[[str], None]] = {
            "help": self.help,
            "reset": self.reset,
            "save": self.save,
            "system": self.system,
            "set": self.set,
            "quit": self.quit,
        }
        self.leaving = False

    def run(self) -> None:
        person = sys.stdin.isatty()
        if person:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines and remembers them)
            note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D quits")
        while not self.leaving:
            try:
                line = input("> " if person else "")
            except EOFError:
                break
            except KeyboardInterrupt:
                if not person:
                    raise
                note("\nCtrl-D or /quit quits")
                continue
            try:
                self.obey(line) if line.startswith("/") else self.respond(line)
            except (ValueError, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                note(f"error: {error}")

    def respond(self, text: str) -> None:
        if not text.strip():
            return
        try:
            if gone := self.conversation.ask(text, self.options["max_new_tokens"] or 256):
                note(f"the context is full: the oldest {gone} turn{'s are' if gone > 1 else ' is'} forgotten")
            with contextlib.closing(self.conversation.answer(**self.options)) as answer:
                for piece in answer:
                    print(piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            note("stopped")
            return
        if self.conversation.last is not None:
            said, timing = self.conversation.last
            if said.finish_reason == "length":
                note(f"stopped after {said.new_tokens} tokens (/set max_new_tokens=N for more)")
            if self.args.stats:
                note(
                    f"{said.prompt_tokens} tokens in, {said.new_tokens} out; "
                    f"{timing.tokens_per_second:.1f} tokens/s, the first after {timing.first_token:.2f} s"
                )

    def obey(self, line: str) -> None:
        word, _, rest = line[1:].partition(" ")
        if word not in self.commands:
            raise ValueError(
                f"there is no command /{word}{nearest(word, self.commands)}; there are /{', /'.join(self.commands)} "
                "(a message may begin with a space and then a slash)"
            )
        self.commands[word](rest.strip())

    def help(self, _: str) -> None:
        """shows this"""
        for name, command in self.commands.items():
            note(f"/{name:7} {command.__doc__}")

    def reset(self, _: str) -> None:
        """forgets the conversation; the system message and the settings stay"""
        self.conversation.messages = []

    def save(self, file: str) -> None:
        """FILE: writes the conversation as JSON, a list of messages with role and content"""
        if not file:
            raise ValueError("/save needs a file: /save chat.json")
        path = Path(file).expanduser()
        if path.exists() and path not in self.saved:
            raise ValueError(f"{path} exists: name another file")
        path.write_text(json.dumps(self.conversation.history(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self.saved.add(path)
        note(f"saved {path}")

    def system(self, text: str) -> None:
        """TEXT: sets the system message, from here on; without TEXT there is none, or the template's own"""
        self.conversation.system = text or None

    def set(self, text: str) -> None:
        """NAME=VALUE: changes a setting (VALUE none: the model's own again); alone it shows them"""
        if not text:
            note("\n".join(f"{name}={getattr(self.args, name)}" for name in SETTINGS))
            return
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in SETTINGS:
            raise ValueError(f"there is no setting {name!r}{nearest(name, SETTINGS)}; there are {', '.join(SETTINGS)}")
        try:
            parsed = ([] if name == "stop" else None) if value == "none" else SETTINGS[name](value)
        except (ValueError, KeyError, argparse.ArgumentTypeError):
            raise ValueError(f"/set {name}=VALUE: {value!r} does not do for it") from None
        changed = argparse.Namespace(**vars(self.args) | {name: parsed})
        self.options = run_options(changed)
        self.args = changed

    def quit(self, _: str) -> None:
        """ends the chat, as does Ctrl-D"""
        self.leaving = True


def note(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
