"""SentencePiece's `tokenizer.model` (Llama 1 and 2, Mistral), by the `sentencepiece` package itself."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fms.utils.tokenizers.base import PieceTokenizer, check_text, copy_files
from fms.utils.tokenizers.config import content, end_ids, named_tokens, nameless_tokens, read_config, write_config


def load_sentencepiece(path: Path) -> "SentencePieceTokenizer":
    """A tokenizer from a model file; the tokenizer_config.json beside it, if any, says what encoding adds."""
    try:
        return SentencePieceTokenizer(path.read_bytes(), read_config(path.parent), source=path)
    except RuntimeError as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is not a SentencePiece model: {error}") from error


class SentencePieceTokenizer(PieceTokenizer):
    """A SentencePiece model, and the tokens that a `tokenizer_config.json` adds after it.

    As in SentencePiece itself control tokens (`</s>`) in a text are text; only a chat template writes them. Each
    stretch of text between special tokens is encoded by itself, with the space in front that the model is used to.
    """

    _errors = "fms.each_byte"
    _skipped = ""

    def __init__(self, model: bytes, config: Mapping[str, Any], source: Path | None = None) -> None:
        """`model`: a file's content; `config`: as in tokenizer_config.json; by default bos is added, eos not."""
        from sentencepiece import SentencePieceProcessor

        self.processor = SentencePieceProcessor(model_proto=model)
        self.source = source
        size = self.processor.get_piece_size()
        added = {i: token for i, token in config.get("added_tokens_decoder", {}).items() if i >= size}
        self._added = {content(token): i for i, token in added.items()}
        self._added_tokens = {i: token for token, i in self._added.items()}
        extra = [i for i, token in added.items() if isinstance(token, dict) and token.get("special")]
        extra += [self._find(content(token)) for token in nameless_tokens(config)]
        own = {f"{name}_token": getattr(self.processor, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
        ids = own | {name: self._find(content(token)) for name, token in named_tokens(config)}
        ids = {name: i for name, i in ids.items() if i is not None and i >= 0}
        super().__init__(
            ids.get("bos_token"),
            end_ids(ids),
            pad_token_id=ids.get("pad_token"),
            special_ids=[
                *(i for i in range(size) if self.processor.is_control(i)),
                *(i for i in extra if i is not None),
            ],
            special_tokens={name: self._spelling(i) for name, i in ids.items()},
            chat_template=config.get("chat_template"),
        )
        self._adds_bos, self._adds_eos = config.get("add_bos_token", True), config.get("add_eos_token", False)
        self._added_in_text = _any_of(self._added)
        self._special_in_text = _any_of([*self._added, *(self._spelling(i) for i in self.special_ids)])
        self._unknown = self.processor.decode([self.processor.unk_id()]).encode()  # bytes: its space is no word's
        word = next((i for i in range(size) if re.fullmatch("▁[a-z]+", self._spelling(i))), None)
        self._strips_first = word is not None and not self.processor.decode([word]).startswith(" ")

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids = self._encode(check_text(text), self._added_in_text)
        if add_special_tokens:
            before = [self.bos_token_id] if self._adds_bos and self.bos_token_id is not None else []
            after = [self.eos_token_id] if self._adds_eos and self.eos_token_id is not None else []
            return [*before, *ids, *after]
        return ids

    def _encode_rendered(self, text: str) -> list[int]:
        return self._encode(check_text(text), self._special_in_text)

    def _encode(self, text: str, tokens: re.Pattern[str] | None) -> list[int]:
        if tokens is None:
            return self.processor.encode(text)
        ids: list[int] = []
        for n, part in enumerate(tokens.split(text)):  # text, token, text, token, ..., text
            ids += [self._token_id(part)] if n % 2 else self.processor.encode(part)
        return ids

    def _piece(self, token_id: int) -> str | bytes:
        if not 0 <= token_id < self.processor.get_piece_size():
            return self._added_tokens.get(token_id, "")
        piece = self._spelling(token_id)
        if self.processor.is_byte(token_id):
            return bytes.fromhex(piece[3:5])  # <0x0A>
        return self._unknown if self.processor.is_unknown(token_id) else piece.replace("▁", " ")

    def _spelling(self, token_id: int) -> str:
        if 0 <= token_id < self.processor.get_piece_size():
            return self.processor.id_to_piece(token_id)
        return self._added_tokens.get(token_id, "")

    def _find(self, token: str) -> int | None:
        found = self._added.get(token, self.processor.piece_to_id(token))
        return found if self._spelling(found) == token else None

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [self._spelling(int(i)) for i in ids]

    def _token_id(self, token: str) -> int:
        return self._added.get(token, self.processor.piece_to_id(token))

    def vocab_size(self) -> int:
        return max([self.processor.get_piece_size() - 1, *self._added.values()]) + 1

    def save(self, directory: str | Path) -> None:
        if self.source:
            return copy_files(self.source, directory, "tokenizer.model")
        directory = Path(directory).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self.processor.serialized_model_proto())
        write_config(directory, self, "LlamaTokenizer", add_bos_token=self._adds_bos, add_eos_token=self._adds_eos)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of these texts, the longest first."""
    found = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, found)) + ")") if found else None
