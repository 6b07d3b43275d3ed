"""Byte-level BPE's shared facts: GPT-2's spelling of bytes, and the patterns by which models split text into words."""

from functools import cache

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS_GPT2 = (r"\p{N}", _GPT2)

# By GGUF's name (`tokenizer.ggml.pre`): patterns applied in turn, each to what the one before left, as llama.cpp does.
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,  # Granite
    "starcoder": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "llama-bpe": (LLAMA3_SPLIT,),
    "llama3": (LLAMA3_SPLIT,),
    "llama-v3": (LLAMA3_SPLIT,),
    "falcon3": (LLAMA3_SPLIT,),
    "pixtral": (LLAMA3_SPLIT,),
    "smaug-bpe": (LLAMA3_SPLIT,),
    "dbrx": (LLAMA3_SPLIT,),  # Granite 4
    "qwen2": (_QWEN2,),
    "stablelm2": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
# Words that are tokens are taken whole, whatever the merges say; and these add bos where the file does not say.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def spelled_bytes(token: str) -> bytes:
    """The bytes of a token in GPT-2's spelling; a token that is not in it stands for itself."""
    alphabet = byte_alphabet()
    return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode("utf-8")


def spelled(data: bytes) -> str:
    """The inverse of `spelled_bytes`."""
    return "".join(map(_byte_spelling().__getitem__, data))


@cache
def _byte_spelling() -> dict[int, str]:
    return {b: c for c, b in byte_alphabet().items()}
