"""The tokenizer interface: text to token ids and back, and what generation and chat ask about special tokens."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from fms.utils.tokenizers.chat import render_chat
from fms.utils.tokenizers.stream import PieceStream, StreamDecoder, WindowStream

# What stands beside a tokenizer's own file and belongs to it.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class BaseTokenizer(ABC):
    """Text to ids and back. A subclass gives the abstract methods, and better `encode` and `decode` if it has them.

    `special_ids` are the ids that `decode` leaves out by default: bos, eos, pad and whatever else the tokenizer
    calls special. An id that has no token (a model's vocabulary may be padded) decodes to nothing.
    """

    def __init__(
        self,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        pad_token_id: int | None = None,
        special_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`special_tokens`: text by name ("bos_token": "<s>"), for chat templates. The eos is the first of several."""
        self.bos_token_id = bos_token_id
        self.eos_token_ids: tuple[int, ...] = (
            () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        )
        self.pad_token_id = pad_token_id
        named = (i for i in (bos_token_id, pad_token_id, *self.eos_token_ids) if i is not None)
        self.special_ids: frozenset[int] = frozenset((*special_ids, *named))
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template

    @property
    def eos_token_id(self) -> int | None:
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @abstractmethod
    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text as the vocabulary spells them."""

    @abstractmethod
    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]: ...

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    @abstractmethod
    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """One token to its id, a list to a list. `ValueError` where there is neither the token nor an unknown one."""

    @abstractmethod
    def convert_tokens_to_string(self, tokens: list[str]) -> str: ...

    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text, with the tokens a model expects around it (usually bos) if `add_special_tokens`.

        Special tokens written in the text become their ids, as they do in Hugging Face's tokenizers: text of strangers
        can therefore end a turn. SentencePiece models are the exception, as in their own library: `</s>` is text there.
        """
        ids = self.convert_tokens_to_ids(self.tokenize(text))
        return [self.bos_token_id, *ids] if add_special_tokens and self.bos_token_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in as_ints(ids) if not (skip_special_tokens and i in self.special_ids)]
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(kept))

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """Decode ids one by one: `put(id)` returns text that is final, `finish()` the rest; together: `decode`."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        return WindowStream(partial(self.decode, skip_special_tokens=skip_special_tokens), skipped)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of a chat, `[{"role": "user", "content": "..."}, ...]`, in the form that the model was tuned on.

        The template writes bos itself where it belongs, so none is added. Further `variables` (`tools`, ...) go to it.
        """
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template: use an instruction-tuned model, or set chat_template"
            )
        variables = {**self.special_tokens, "add_generation_prompt": add_generation_prompt, **variables}
        return self._encode_rendered(render_chat(self.chat_template, messages, variables))

    def _encode_rendered(self, text: str) -> list[int]:
        """Encode what a chat template wrote: special tokens in it always count."""
        return self.encode(text)

    def save(self, directory: str | Path) -> None:
        """Write the files from which `get_tokenizer(directory)` makes this tokenizer again."""
        raise NotImplementedError(f"{type(self).__name__} has no files to save")


class PieceTokenizer(BaseTokenizer):
    """A tokenizer of which every id stands for a piece of text or bytes, so that decoding is joining pieces."""

    _errors = "replace"  # one replacement character for a broken sequence; "fms.each_byte": one for each byte
    _strips_first = False  # the first piece loses the space that encoding put before it

    @abstractmethod
    def _piece(self, token_id: int) -> str | bytes:
        """Text, which ends a run of bytes before it, or bytes, which join those before them to UTF-8 characters."""

    _skipped: str | bytes = b""  # what a special id that is left out counts as: `b""` does not end a run of bytes

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        pieces = lambda i: self._skipped if i in skipped else self._piece(i)
        return PieceStream(pieces, self._errors, self._strips_first)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        stream = self.stream(skip_special_tokens)
        return "".join([stream.put(i) for i in as_ints(ids)]) + stream.finish()

    def tokenize(self, text: str) -> list[str]:
        return self.convert_ids_to_tokens(self.encode(text))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.decode(self.convert_tokens_to_ids(tokens), skip_special_tokens=False)

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        return self._token_id(tokens) if isinstance(tokens, str) else [self._token_id(token) for token in tokens]

    @abstractmethod
    def _token_id(self, token: str) -> int: ...


def as_ints(ids: Iterable[int]) -> list[int]:
    """Plain ints, of a list or of a tensor of one dimension."""
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)


def check_text(text: str) -> str:
    """A lone surrogate is no character: `ValueError` (UnicodeEncodeError) that says where it is."""
    text.encode("utf-8")
    return text


def copy_files(source: Path, directory: str | Path, name: str) -> None:
    """Copy a tokenizer's own file, under `name`, and the files beside it that belong to it."""
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    beside = ((source.with_name(side), side) for side in SIDE_FILES if source.with_name(side).is_file())
    for old, new in ((source, name), *beside):
        if old.resolve() != (directory / new).resolve():
            shutil.copyfile(old, directory / new)
