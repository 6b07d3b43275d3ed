"""Plain text to continue: files, folders, and JSON lines with a text in each."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fms.datasets.corpus import Record, Tokens
from fms.datasets.records import BadRecords, files, lines, objects, text_of
from fms.utils.tokenizers import BaseTokenizer

PLAIN = (".txt", ".text", ".md")
JSON = (".jsonl", ".json")
PIECE = 1 << 14  # characters: of a lone file's documents


def records(
    tokenizer: BaseTokenizer,
    path: str | Path | Iterable[str | Path],
    bad: BadRecords,
    *,
    field: str = "text",
    pattern: str | None = None,
) -> Iterator[Record]:
    """A document is a line's `field` in JSON lines, and a file of plain text; a lone one is cut into pieces.

    `pattern` ("**/*.py") says which files of a folder are taken; else those of PLAIN and JSON are.
    """
    found = files(path, (*PLAIN, *JSON), pattern)
    for file in found:
        if file.suffix in JSON:
            yield from _fields(tokenizer, file, bad, field)
            continue
        text = "".join(line for _, line in lines(file, bad))
        if not text.strip():
            if text:
                bad.report(str(file), "the file has nothing but white space")
            continue
        if len(found) > 1:
            yield Record(str(file), text, whole(tokenizer, text))
            continue
        line = 1
        for piece, last in pieces(text):
            yield Record(f"{file}:{line}", piece, whole(tokenizer, piece, last))
            line += piece.count("\n")


def _fields(tokenizer: BaseTokenizer, file: Path, bad: BadRecords, field: str) -> Iterator[Record]:
    for where, record in objects(file, bad):
        try:
            text = text_of(record, field)
        except ValueError as error:
            bad.report(where, str(error))
        else:
            yield Record(where, text, whole(tokenizer, text))


def whole(tokenizer: BaseTokenizer, text: str, ends: bool = True) -> Callable[[], Tokens]:
    """Encodes a text, with what the tokenizer puts around it (bos) and eos where it `ends`."""

    def encode() -> Tokens:
        ids = tokenizer.encode(text, add_special_tokens=True)
        if ends and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        return ids, None

    return encode


def pieces(text: str, size: int = PIECE) -> Iterator[tuple[str, bool]]:
    """A text in pieces of `size` characters or a little more, up to an empty line if one is near, else a line's end.

    With each, whether it is the last one.
    """
    start = 0
    while start < len(text):
        stop = start + size
        for end in ("\n\n", "\n", " "):
            if (at := text.find(end, stop, stop + size)) >= 0:
                stop = at + len(end)
                break
        if len(text) - stop < size // 2:
            stop = len(text)
        yield text[start:stop], stop == len(text)
        start = stop
