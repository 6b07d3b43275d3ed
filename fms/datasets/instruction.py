"""Examples of what to answer: Alpaca records and chats. Only the answers are to be learnt."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fms.datasets.corpus import Record, Tokens
from fms.datasets.fetch import alpaca
from fms.datasets.records import BadRecords, files, objects, text_of
from fms.utils.serialization.errors import nearest
from fms.utils.tokenizers import BaseTokenizer

ROLES = ("system", "user", "assistant", "tool")
Messages = list[dict[str, Any]]


def records(
    tokenizer: BaseTokenizer,
    path: str | Path | Iterable[str | Path] | None,
    bad: BadRecords,
    *,
    pattern: str | None = None,
) -> Iterator[Record]:
    """A document is an Alpaca record ({"instruction", "output", optionally "input"}) or a chat ({"messages": [...]}).

    Without a path they are those of the Alpaca file, which is fetched once.
    """
    for file in files(alpaca() if path is None else path, (".jsonl", ".json"), pattern):
        for where, record in objects(file, bad):
            try:
                yield example(tokenizer, where, record)
            except ValueError as error:
                bad.report(where, str(error))


def example(tokenizer: BaseTokenizer, where: str, record: Mapping[str, Any]) -> Record:
    """Raises `ValueError` for a record of neither kind."""
    chat = messages_of(record)
    text = "\0".join(f"{message['role']}\0{message.get('content')}" for message in chat)
    return Record(where, text, encoder(tokenizer, chat))


def messages_of(record: Mapping[str, Any]) -> Messages:
    if "messages" not in record:
        if not {"instruction", "output"} <= record.keys():
            raise ValueError(
                "an example has the fields 'instruction' and 'output' (and may have 'input'), or 'messages'; "
                f"this has {', '.join(map(repr, record)) or 'none'}"
            )
        asked = text_of(record, "instruction")
        if isinstance(more := record.get("input"), str) and more.strip():
            asked = f"{asked}\n\n{more}"
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": text_of(record, "output")}]
    chat = record["messages"]
    if not isinstance(chat, list) or not all(isinstance(message, dict) for message in chat):
        raise ValueError("'messages' must be an array of objects with 'role' and 'content'")
    for number, message in enumerate(chat, 1):
        if (role := message.get("role")) not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}{nearest(str(role), ROLES)}, not one of {ROLES}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f"message {number} must have a text as its 'content'")
    if not any(message["role"] == "assistant" for message in chat):
        raise ValueError("no message of the role 'assistant': there is nothing to learn")
    return chat


def encoder(tokenizer: BaseTokenizer, chat: Messages) -> Callable[[], Tokens]:
    return lambda: (_plain if tokenizer.chat_template is None else _templated)(tokenizer, chat)


def _templated(tokenizer: BaseTokenizer, chat: Messages) -> Tokens:
    """As the chat template writes it; of each answer is learnt what follows the words that invite it.

    Only as far as a chat that goes on has it like one that ends there: some templates drop thoughts from past turns.
    """
    render = tokenizer.apply_chat_template
    ids = render(chat, add_generation_prompt=False)
    learnt = [False] * len(ids)
    for n, message in enumerate(chat):
        if n and message["role"] == "assistant":
            invited = render(chat[:n], add_generation_prompt=True)
            start = _shared(ids, invited)
            if start < len(invited) and start < len(render(chat[:n], add_generation_prompt=False)):
                continue  # the template writes what was before otherwise once an answer follows
            stop = len(ids) if n + 1 == len(chat) else _shared(ids, render(chat[: n + 1], add_generation_prompt=False))
            learnt[start:stop] = [True] * (stop - start)
    return ids, learnt


def _shared(a: list[int], b: list[int]) -> int:
    """How many ids they begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _plain(tokenizer: BaseTokenizer, chat: Messages) -> Tokens:
    """For a tokenizer without a template: headings, and eos after each answer."""
    ids: list[int] = []
    learnt: list[bool] = []
    for n, message in enumerate(chat):
        answers = message["role"] == "assistant"
        heading = "### Response:\n" if answers else f"### {_HEADINGS[message['role']]}:\n{message['content']}\n\n"
        part = tokenizer.encode(heading, add_special_tokens=n == 0)
        ids, learnt = ids + part, learnt + [False] * len(part)
        if answers:
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            part = [*tokenizer.encode(message["content"]), *end]
            ids, learnt = ids + part, learnt + [True] * len(part)
    return ids, learnt


_HEADINGS = {"system": "System", "user": "Instruction", "tool": "Tool"}
