"""Hugging Face's `tokenizer.json`, by the `tokenizers` package, with its small files beside it; no transformers."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fms.utils.tokenizers.base import BaseTokenizer, PieceTokenizer, as_ints, check_text, copy_files
from fms.utils.tokenizers.bytelevel import spelled_bytes
from fms.utils.tokenizers.config import (
    content,
    end_ids,
    named_tokens,
    nameless_tokens,
    read_config,
    read_json,
    write_config,
)
from fms.utils.tokenizers.stream import StreamDecoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_hf(path: Path) -> "HFTokenizer":
    """A tokenizer from a `tokenizer.json`; special tokens and chat template from the directory it is in."""
    from tokenizers import Tokenizer

    text = path.read_text(encoding="utf-8").strip()
    if not (text.startswith("{") and text.endswith("}") and '"model"' in text):
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a tokenizer.json: a whole JSON object with a "
            f'"model" is required, and it begins {text[:40]!r}'
        )
    backend = Tokenizer.from_str(text)
    config = read_config(path.parent)
    ids, extra = _add_tokens(backend, config, path)
    ends: list[int] = []
    if "bos_token" not in ids and "eos_token" not in ids:  # old directories leave them to the model's config
        model = read_json(path.with_name("config.json"))
        ends = model["eos_token_id"] if isinstance(model.get("eos_token_id"), list) else []
        found = {"bos_token": model.get("bos_token_id"), "eos_token": ends[0] if ends else model.get("eos_token_id")}
        ids |= {name: i for name, i in found.items() if i is not None and backend.id_to_token(i) is not None}
    return HFTokenizer(backend, ids, ends=ends, extra_special=extra, chat_template=config["chat_template"], source=path)


def _add_tokens(backend: "Tokenizer", config: Mapping[str, Any], path: Path) -> tuple[dict[str, int], list[int]]:
    """Add what the small files name and tokenizer.json lacks, in transformers' order; special ids by name, and more."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}

    def add(token: Any, special: bool) -> int:
        if content(token) not in known:
            fields = token if isinstance(token, dict) else {"content": token}
            flags = {k: v for k, v in fields.items() if not k.startswith("__")}
            backend.add_tokens([AddedToken(**{"special": special, **flags})])
            known.add(content(token))
        found = backend.token_to_id(content(token))
        assert found is not None
        return found

    for i, token in config["added_tokens_decoder"].items():
        if (found := add(token, special=False)) != i:
            raise ValueError(f"{path}: {content(token)!r} has id {found} there, and {i} in the files beside it")
    named = {name: add(token, special=True) for name, token in named_tokens(config)}
    return named, [add(token, special=True) for token in nameless_tokens(config)]


class HFTokenizer(PieceTokenizer):
    """A `tokenizers.Tokenizer`. `add_special_tokens` applies its post-processor; truncation and padding are off."""

    def __init__(
        self,
        backend: "Tokenizer",
        ids: Mapping[str, int],
        *,
        ends: Sequence[int] = (),
        extra_special: Sequence[int] = (),
        chat_template: str | None = None,
        source: Path | None = None,
    ) -> None:
        """`ids`: special ids by name, "bos_token", ...; `ends`: all that end a text, if more; `source`: its file."""
        backend.no_truncation()
        backend.no_padding()
        special = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
        super().__init__(
            ids.get("bos_token"),
            ends or end_ids(ids),
            pad_token_id=ids.get("pad_token"),
            special_ids=[*special, *ids.values(), *extra_special],
            special_tokens={name: backend.id_to_token(i) or "" for name, i in ids.items()},
            chat_template=chat_template,
        )
        self.backend, self.source = backend, source
        self._unk_id = ids.get("unk_token")
        self._piece_of, self._errors, self._strips_first = piece_reader(backend)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.backend.encode(check_text(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        if self._piece_of:
            return super().decode(ids, skip_special_tokens)
        kept = [i for i in as_ints(ids) if not (skip_special_tokens and i in self.special_ids)]
        return self.backend.decode(kept, skip_special_tokens=False)

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        if self._piece_of:
            return super().stream(skip_special_tokens)
        return BaseTokenizer.stream(self, skip_special_tokens)

    def _piece(self, token_id: int) -> str | bytes:
        assert self._piece_of
        token = self.backend.id_to_token(token_id) if token_id >= 0 else None
        return self._piece_of(token) if token is not None else b""

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [self.backend.id_to_token(i) or "" for i in as_ints(ids)]

    def _token_id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        found = self._unk_id if found is None else found
        if found is None:
            raise ValueError(f"the vocabulary has no token {token!r}, and no unknown token")
        return found

    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def save(self, directory: str | Path) -> None:
        if self.source:
            return copy_files(self.source, directory, "tokenizer.json")
        directory = Path(directory).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        write_config(directory, self, "PreTrainedTokenizerFast")


def piece_reader(backend: "Tokenizer") -> tuple[Callable[[str], str | bytes] | None, str, bool]:
    """How a token reads, from the tokenizer's decoder: (token -> piece, rule for broken bytes, first space stripped).

    Two families are known: byte-level, and SentencePiece's replace, byte fallback, fuse, strip. Others give None.
    """
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    if state.get("type") == "ByteLevel":
        return spelled_bytes, "replace", False
    steps = state.get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return None, "replace", False
    old, new = steps[0]["pattern"].get("String"), steps[0]["content"]
    strip = {key: value for key, value in steps[-1].items() if len(steps) == 4}
    if old is None or strip not in ({}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}):
        return None, "replace", False
    byte = re.compile("<0x([0-9A-Fa-f]{2})>").fullmatch
    read = lambda token: bytes.fromhex(found[1]) if (found := byte(token)) else token.replace(old, new)
    return read, "fms.each_byte", bool(strip)
