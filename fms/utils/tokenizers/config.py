"""What Hugging Face's small files beside a tokenizer say: special tokens, added tokens, the chat template."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fms.utils.tokenizers.base import BaseTokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where an object is required")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, filled up from special_tokens_map.json; a chat_template.jinja wins over the one inside.

    "added_tokens_decoder" comes as {id: token} with added_tokens.json in it, "chat_template" as text or None.
    """
    config = read_json(directory / "special_tokens_map.json")
    config |= {k: v for k, v in read_json(directory / "tokenizer_config.json").items() if v is not None}
    added = {i: {"content": token} for token, i in read_json(directory / "added_tokens.json").items()}
    added |= {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    config["added_tokens_decoder"] = dict(sorted(added.items()))
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    jinja = directory / "chat_template.jinja"
    config["chat_template"] = jinja.read_text(encoding="utf-8") if jinja.is_file() else template
    return config


def content(token: str | Mapping[str, Any]) -> str:
    """A token's text; version 4 wrote it as text or as an object, version 5 writes text."""
    return token if isinstance(token, str) else token["content"]


def named_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """("bos_token", "<s>" or an object), ...: whatever key ends in "_token" and holds one, extra ones by name too."""
    extra = config.get("extra_special_tokens", {})
    for name, token in {**config, **(extra if isinstance(extra, dict) else {})}.items():
        if name.endswith("_token") and isinstance(token, (str, dict)) and content(token):
            yield name, token


def end_ids(ids: Mapping[str, int]) -> list[int]:
    """The ids that end generation: of a text, of a turn ("eot"), of a message before a tool's answer ("eom")."""
    return list(dict.fromkeys(ids[name] for name in ("eos_token", "eot_token", "eom_token") if name in ids))


def nameless_tokens(config: Mapping[str, Any]) -> list[Any]:
    """Special tokens without a role: "additional_special_tokens" in version 4, a list of "extra" ones in version 5."""
    extra = config.get("extra_special_tokens", [])
    return [*config.get("additional_special_tokens", []), *(extra if isinstance(extra, list) else [])]


def write_config(directory: Path, tokenizer: BaseTokenizer, tokenizer_class: str, **more: Any) -> None:
    """tokenizer_config.json and chat_template.jinja, as transformers 5 writes them."""
    config = {
        "tokenizer_class": tokenizer_class,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
        **more,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if tokenizer.chat_template is not None:
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
