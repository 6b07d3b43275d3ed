"""Tokenizers of every kind of checkpoint behind one interface: `get_tokenizer(name_or_path)`, `BaseTokenizer`."""

from fms.utils.tokenizers.base import BaseTokenizer
from fms.utils.tokenizers.char import CharTokenizer
from fms.utils.tokenizers.gguf import from_gguf
from fms.utils.tokenizers.lookup import get_tokenizer
from fms.utils.tokenizers.stream import StreamDecoder

__all__ = ["BaseTokenizer", "CharTokenizer", "StreamDecoder", "from_gguf", "get_tokenizer"]
