"""Finds a tokenizer by a name, a file, a directory or a Hub id, and tells the kinds of files apart."""

import re
from collections.abc import Callable
from pathlib import Path

from fms.utils.serialization.errors import nearest
from fms.utils.tokenizers.base import BaseTokenizer
from fms.utils.tokenizers.char import CharTokenizer
from fms.utils.tokenizers.config import read_json
from fms.utils.tokenizers.gguf import from_gguf
from fms.utils.tokenizers.hf import load_hf
from fms.utils.tokenizers.spm import load_sentencepiece
from fms.utils.tokenizers.tiktoken import LLAMA3_RANKS, load_tiktoken

CHAR = "char_tokenizer"
HUB_FILES = ["tokenizer.json", "tokenizer.model", "*token*.json", "chat_template.jinja", "config.json"]


def _load_gguf(path: Path) -> BaseTokenizer:
    from fms.utils.serialization.gguf import GGUFReader

    return from_gguf(GGUFReader(path).metadata)


LOADERS: dict[str, Callable[[Path], BaseTokenizer]] = {
    "hf": load_hf,
    "sentencepiece": load_sentencepiece,
    "tiktoken": load_tiktoken,
    "gguf": _load_gguf,
}
STYLES = (*LOADERS, "fms")
FILE_NAMES = {
    "hf": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
    "tiktoken": "tokenizer.model",
    "gguf": "*.gguf",
}


def get_tokenizer(name_or_path: str | Path, style: str | None = None) -> BaseTokenizer:
    """A tokenizer by its name "char_tokenizer", its file, the directory it is in, or a Hub id `org/name`.

    Files are `tokenizer.json`, `tokenizer.model` (SentencePiece or tiktoken: its first bytes say which) and `.gguf`; a
    directory is searched in this order. A Hub id goes through huggingface_hub and its local cache, offline too.
    `style` ("hf", "sentencepiece", "tiktoken", "gguf", "fms") takes that kind instead.
    """
    if style is not None and style not in STYLES:
        raise ValueError(f"unknown tokenizer style {style!r}{nearest(style, STYLES)}; known are {', '.join(STYLES)}")
    if style == "fms" and str(name_or_path) != CHAR:
        raise ValueError(f"style 'fms' has {CHAR!r} only, not {str(name_or_path)!r}")
    if str(name_or_path) == CHAR and style in (None, "fms"):
        return CharTokenizer()
    path = Path(name_or_path).expanduser()
    if not path.exists():
        path = _from_hub(str(name_or_path), path)
    if path.is_dir():
        if style is None and read_json(path / "tokenizer_config.json").get("tokenizer_class") == "CharTokenizer":
            return CharTokenizer()
        path = _find(path, style)
    return LOADERS[style or kind_of(path)](path)


def _find(directory: Path, style: str | None) -> Path:
    """The tokenizer's file in a directory."""
    names = list(dict.fromkeys(FILE_NAMES.values())) if style is None else [FILE_NAMES[style]]
    for name in names:
        # of a checkpoint in several parts the first one has the tokenizer
        found = [p for p in sorted(directory.glob(name)) if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.", p.name)]
        if len(found) > 1:
            raise ValueError(f"{directory} has several {name}: name one of {', '.join(p.name for p in found)}")
        if found:
            return found[0]
    raise ValueError(f"{directory} has no tokenizer: looked for {', '.join(names)}")


def kind_of(path: Path) -> str:
    """Which loader a file is for, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(b"GGUF"):
        return "gguf"
    if path.suffix == ".json":
        return "hf"
    if head.startswith(b"\n"):  # protobuf: field 1, the first piece
        return "sentencepiece"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head):
        with path.open("rb") as file:
            ranks = sum(1 for _ in file)
        if ranks == LLAMA3_RANKS:
            return "tiktoken"
        raise ValueError(
            f"{path} has {ranks} tiktoken ranks; known are Llama 3's {LLAMA3_RANKS}. style='tiktoken' takes the file "
            "with Llama 3's pattern and special tokens all the same"
        )
    hint = (
        ": a pointer of Git LFS, whose content was not fetched" if head.startswith(b"version https://git-lfs") else ""
    )
    raise ValueError(
        f"{path} ({path.stat().st_size} bytes) is no tokenizer that is known{hint}. It begins {head[:40]!r}; "
        "required is a tokenizer.json, a SentencePiece or tiktoken tokenizer.model, or a GGUF file"
    )


def _from_hub(name: str, path: Path) -> Path:
    """The directory of a Hub id's tokenizer files."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        beside = [str(path.with_name(p.name)) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(
            f"no tokenizer {name!r}{nearest(str(path), [CHAR, *beside])}: required is {CHAR!r}, a tokenizer's file, "
            "a directory that has one, or a Hub id like 'org/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"no tokenizer {name!r}: there is no such file or directory, and the Hub says: {error}"
        ) from error
