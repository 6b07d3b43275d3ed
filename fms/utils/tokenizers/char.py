"""The character tokenizer: one id a Latin-1 character, for tests and toy trainings that need no vocabulary file."""

import json
from collections.abc import Iterable
from pathlib import Path

from fms.utils.tokenizers.base import PieceTokenizer


class CharTokenizer(PieceTokenizer):
    """Ids are code points; those over 255 become 0. Id 2 is bos, id 3 is eos."""

    def __init__(self) -> None:
        super().__init__(bos_token_id=2, eos_token_id=3)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids = [ord(c) if ord(c) < 256 else 0 for c in text]
        return [2, *ids] if add_special_tokens else ids

    def _piece(self, token_id: int) -> str:
        return chr(token_id) if 0 <= token_id < 256 else ""

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [self._piece(i) for i in ids]

    def _token_id(self, token: str) -> int:
        if len(token) != 1:
            raise ValueError(f"the character tokenizer's tokens are single characters, not {token!r}")
        return self.encode(token)[0]

    def vocab_size(self) -> int:
        return 256

    def save(self, directory: str | Path) -> None:
        path = Path(directory).expanduser() / "tokenizer_config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"tokenizer_class": "CharTokenizer"}) + "\n", encoding="utf-8")
