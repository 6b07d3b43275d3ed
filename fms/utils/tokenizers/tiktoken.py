"""tiktoken's `tokenizer.model` as Meta publishes it with Llama 3: lines of a token in base64 and its rank."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fms.utils.tokenizers.base import PieceTokenizer, as_ints, check_text, copy_files
from fms.utils.tokenizers.bytelevel import LLAMA3_SPLIT, spelled, spelled_bytes
from fms.utils.tokenizers.config import content, end_ids, named_tokens, read_config

LLAMA3_RANKS = 128_000
LLAMA3_ROLES = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "eom_token": "<|eom_id|>",  # the end of a message, before a tool's answer
    "eot_token": "<|eot_id|>",  # the end of a turn
    "pad_token": "<|finetune_right_pad_id|>",
}
# A long run of spaces overflows the stack of tiktoken's regex: runs of spaces or of others are cut here, as Meta does.
_LONG_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")


def _llama3_special_tokens() -> list[str]:
    """The 256 special tokens in the order of their ids, by Llama 3.1's names."""
    named = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 5: "<|step_id|>"}
    named |= {6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>"}
    named |= {10: "<|python_tag|>", 11: "<|image|>"}
    reserved = iter(range(256))
    return [named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]


def load_tiktoken(path: Path) -> "TiktokenTokenizer":
    """Llama 3's tokenizer; roles and the chat template from a tokenizer_config.json beside it, if any."""
    return TiktokenTokenizer(read_ranks(path), read_config(path.parent), source=path)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank. `ValueError` names the line that is not `base64 rank`, or the first rank that is missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is {line[:60]!r}, where a base64 token and its rank are required"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path}: {len(ranks)} tokens, whose ranks are not 0, 1, ... or which lack a single byte")
    return ranks


class TiktokenTokenizer(PieceTokenizer):
    """Byte-level BPE by ranks, with Llama 3's pattern and special tokens, whose ids follow the ranks.

    Special tokens in a text become their ids, as with the same model's `tokenizer.json`.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        config: Mapping[str, Any],
        source: Path,
        special_tokens: Sequence[str] = tuple(_llama3_special_tokens()),
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError("this tokenizer.model needs tiktoken: pip install tiktoken") from error
        special = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
        self.encoding = tiktoken.Encoding(
            name=str(source), pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special
        )
        roles = LLAMA3_ROLES | {name: content(token) for name, token in named_tokens(config)}
        ids = {name: special[token] for name, token in roles.items() if token in special}
        super().__init__(
            ids.get("bos_token"),
            end_ids(ids),
            pad_token_id=ids.get("pad_token"),
            special_ids=special.values(),
            special_tokens={name: token for name, token in roles.items() if token in special},
            chat_template=config.get("chat_template"),
        )
        self.source = source
        self._bytes = {i: token for token, i in ranks.items()} | {i: token.encode() for token, i in special.items()}
        self._special, self._ranks = special, ranks

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        cuts = [0, *(run.end() for run in _LONG_RUN.finditer(check_text(text))), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        ids = [i for part in parts for i in self.encoding.encode(part, allowed_special="all")]
        return [self.bos_token_id, *ids] if add_special_tokens and self.bos_token_id is not None else ids

    def _piece(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        special = {i: token for token, i in self._special.items()}
        return [special.get(i) or spelled(self._piece(i)) for i in as_ints(ids)]

    def _token_id(self, token: str) -> int:
        found = self._special.get(token, self._ranks.get(spelled_bytes(token)))
        if found is None:
            raise ValueError(f"the vocabulary has no token {token!r}, and no unknown token")
        return found

    def vocab_size(self) -> int:
        return len(self._bytes)

    def save(self, directory: str | Path) -> None:
        copy_files(self.source, directory, "tokenizer.model")
