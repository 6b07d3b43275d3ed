"""The tokenizer inside a GGUF file, from the file's metadata: byte-level BPE ("gpt2") or SentencePiece ("llama")."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fms.utils.serialization.errors import nearest
from fms.utils.tokenizers.base import BaseTokenizer
from fms.utils.tokenizers.bytelevel import SPLITS, WHOLE_WORDS
from fms.utils.tokenizers.hf import HFTokenizer
from fms.utils.tokenizers.spm import SentencePieceTokenizer

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # kinds of tokens, the same numbers in GGUF and in SentencePiece
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "eot_token": "eot_token_id",
    "eom_token": "eom_token_id",
}


def from_gguf(metadata: Mapping[str, Any]) -> BaseTokenizer:
    """A tokenizer from a GGUF file's key-values. `eos_token_ids` has the ends of a turn and of a message too."""
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in kinds:
        raise ValueError(f"no tokenizer for tokenizer.ggml.model {kind!r}; known are {', '.join(kinds)}")
    tokens = list(_required(metadata, "tokens"))
    named = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _ROLES.items()}
    ids = {name: int(i) for name, i in named.items() if i is not None}
    for name, i in ids.items():
        if not 0 <= i < len(tokens):
            raise ValueError(f"the GGUF file's {name} has id {i}, and there are {len(tokens)} tokens")
    types = [int(t) for t in metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))]
    if len(types) != len(tokens):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens and {len(types)} token types")
    return kinds[kind](metadata, tokens, types, ids)


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if f"tokenizer.ggml.{key}" not in metadata:
        raise ValueError(f"the GGUF file has no tokenizer.ggml.{key}, which its tokenizer needs")
    return metadata[f"tokenizer.ggml.{key}"]


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], ids: dict[str, int]) -> HFTokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise ValueError(f"unknown tokenizer.ggml.pre {pre!r}{nearest(pre, SPLITS)}; known are {', '.join(SPLITS)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "merges")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    backend.decoder = decoders.ByteLevel()
    special = set(ids.values())
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != _USER or i in special)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER) or i in special
        ]
    )
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", pre in WHOLE_WORDS) and "bos_token" in ids
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in ids
    around = [tokens[ids["bos_token"]]] * adds_bos + ["$A"] + [tokens[ids["eos_token"]]] * adds_eos
    backend.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, vocab[token]) for token in around if token != "$A"]
    )
    return HFTokenizer(backend, ids, chat_template=metadata.get("tokenizer.chat_template"))


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], ids: dict[str, int]
) -> SentencePieceTokenizer:
    if _UNKNOWN not in types:
        types[ids.get("unk_token", 0)] = _UNKNOWN
    scores = _required(metadata, "scores")
    pad_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    config = {
        **{name: tokens[i] for name, i in ids.items()},
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", True),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    try:
        return SentencePieceTokenizer(model_proto(tokens, scores, types, ids, pad_prefix), config)
    except RuntimeError as error:
        raise ValueError(f"the GGUF file's tokens make no SentencePiece model: {error}") from error


def model_proto(
    tokens: Sequence[str], scores: Iterable[float], types: Sequence[int], ids: Mapping[str, int], add_dummy_prefix: bool
) -> bytes:
    """A SentencePiece model file (sentencepiece_model.proto) of the BPE kind that keeps every space of a text."""
    pieces = zip(tokens, scores, types, strict=True)
    body = b"".join(_data(1, _data(1, t.encode()) + _float(2, score) + _int(3, kind)) for t, score, kind in pieces)
    trainer = _int(3, 2) + _int(4, len(tokens)) + _int(35, types.count(_BYTE) == 256)  # BPE, size, byte fallback
    roles = {**ids, "unk_token": types.index(_UNKNOWN)}
    for number, role in ((0, "unk_token"), (1, "bos_token"), (2, "eos_token"), (3, "pad_token")):
        i = roles.get(role, -1)
        trainer += _int(40 + number, i) + (_data(45 + number, tokens[i].encode()) if i >= 0 else b"")
    # its name, the prefix, spaces not removed, spaces written as U+2581
    normalizer = _data(1, b"identity") + _int(3, add_dummy_prefix) + _int(4, 0) + _int(5, 1)
    return body + _data(2, trainer) + _data(3, normalizer)


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # protobuf's negative numbers
    low = []
    while value > 0x7F:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*low, value])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _data(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
