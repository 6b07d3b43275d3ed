"""Streaming decoders: token ids in, one by one, text out as soon as it is final, at a cost that does not grow."""

import codecs
from collections.abc import Callable
from typing import Protocol

REPLACEMENT = "\ufffd"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece's rule for broken UTF-8: a replacement character for every byte."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("fms.each_byte", _each_byte)


class StreamDecoder(Protocol):
    def put(self, token_id: int) -> str:
        """The text that this token makes final: whole characters that no later token changes, or nothing yet."""

    def finish(self) -> str:
        """What was held back: the replacement characters of a character that never became whole."""


class PieceStream:
    """Joins pieces: text ends a run of bytes, bytes make UTF-8 characters together. Exact, a constant cost a token."""

    def __init__(self, piece: Callable[[int], str | bytes], errors: str, strips_first: bool) -> None:
        self._piece, self._strip = piece, strips_first
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def put(self, token_id: int) -> str:
        piece = self._piece(int(token_id))
        if isinstance(piece, bytes):
            self._strip = self._strip and not piece
            return self._utf8.decode(piece)
        if self._strip and piece:
            self._strip, piece = False, piece.removeprefix(" ")
        return self._utf8.decode(b"", final=True) + piece

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowStream:
    """For a decoder that is only a function: decodes the last few tokens again and gives out what is new.

    Exact where a token's text depends only on the tokens just before it. The window reaches back to the tokens of the
    last text given out, and no further than `LIMIT` tokens while bytes stay broken.
    """

    LIMIT = 16

    def __init__(self, decode: Callable[[list[int]], str], skipped: frozenset[int]) -> None:
        self._decode, self._skipped = decode, skipped
        self._ids: list[int] = []
        self._context = 0  # so many of the ids are only there for what stands before the others
        self._given = 0  # so many characters of the window's text were given out

    def put(self, token_id: int) -> str:
        if int(token_id) in self._skipped:
            return ""
        self._ids.append(int(token_id))
        text = self._decode(self._ids)
        # the last character may still lack a byte, and shows as one to three replacements
        unsure = min(3, len(text) - len(text.rstrip(REPLACEMENT)))
        new = text[self._given : len(text) - unsure]
        self._given += len(new)
        if (new and not unsure) or len(self._ids) > self.LIMIT:
            self._ids = self._ids[self._context :] if new and not unsure else self._ids[-self.LIMIT // 2 :]
            self._context = len(self._ids)
            self._given = len(self._decode(self._ids)) - unsure
        return new

    def finish(self) -> str:
        text = self._decode(self._ids)[self._given :]
        self._given += len(text)
        return text
