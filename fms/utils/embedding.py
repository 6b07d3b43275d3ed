"""Vectors of texts: a model's states pooled as the files of sentence-transformers beside its weights say."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fms.utils.serialization.errors import nearest
from fms.utils.tokenizers import BaseTokenizer
from fms.utils.tokenizers.config import read_json

log = logging.getLogger(__name__)

MODULES, SETTINGS, MORE = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"


def _mean(h: Tensor, real: Tensor) -> Tensor:
    return (h * real).sum(1) / real.sum(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # of states (b, s, d) and of 1 for real tokens, 0 for the padding behind them (b, s, 1)
    "cls": lambda h, real: h[:, 0],
    "max": lambda h, real: h.masked_fill(real == 0, -torch.inf).amax(1),
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda h, real: (h * real).sum(1) / real.sum(1).sqrt(),
    "weightedmean": lambda h, real: _mean(h, real * real.cumsum(1)),  # the n-th token counts n times
    "lasttoken": lambda h, real: h[torch.arange(len(h)), real.sum(1).long().flatten() - 1],
}
FLAGS = {  # of a pooling's configuration; several are joined in this order
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
SIMILARITIES: dict[str, Callable[[Tensor], Tensor]] = {  # of vectors (n, d) to each other, (n, n)
    "cosine": lambda v: F.normalize(v) @ F.normalize(v).T,
    "dot": lambda v: v @ v.T,
    "euclidean": lambda v: -torch.cdist(v, v),
    "manhattan": lambda v: -torch.cdist(v, v, p=1),
}


@dataclass(frozen=True)
class Recipe:
    """How a directory's vectors are made and compared.

    Several poolings are joined to one vector. Texts are cut to `max_tokens`, and begin with `prompts[prompt]`.
    `weights` is where the model lies within the directory.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    similarity: str = "cosine"
    weights: str = ""

    def __post_init__(self) -> None:
        for what, name, known in (
            *(("pooling", name, POOLINGS) for name in self.pooling),
            ("prompt", self.prompt, {None: "", **self.prompts}),
            ("similarity", self.similarity, SIMILARITIES),
        ):
            if name not in known:
                names = [str(n) for n in known if n is not None]
                raise ValueError(
                    f"{what} {name!r} is not known{nearest(str(name), names)}; known are {', '.join(names) or 'none'}"
                )


def read_recipe(directory: Path) -> Recipe:
    """From modules.json and what it names; where there is none, the mean of the real tokens.

    Raises `ValueError` on a module or a setting that is not known.
    """
    values: dict[str, Any] = {}
    for kind, path in _modules(directory):
        if kind == "Transformer":
            values["weights"] = path
        elif kind == "Pooling":
            values["pooling"] = _pooling(directory / path / "config.json")
        elif kind == "Normalize":
            values["normalize"] = True
        else:
            raise ValueError(
                f"{directory / MODULES}: a module {kind!r} is not supported, only Transformer, Pooling, Normalize"
            )
    settings = read_json(directory / values.get("weights", "") / SETTINGS)
    more = read_json(directory / MORE)
    return Recipe(
        **values,
        max_tokens=settings.get("max_seq_length"),
        lowercase=bool(settings.get("do_lower_case")),
        prompts=more.get("prompts") or {},
        prompt=more.get("default_prompt_name"),
        similarity=more.get("similarity_fn_name") or "cosine",
    )


def recipe_files(directory: Path) -> list[Path]:
    """What `read_recipe` reads, and whatever else its modules have; without the directory that it is in."""
    parts = [directory / path for _, path in _modules(directory) if path]
    inner = [file for part in parts for file in sorted(part.rglob("*"))]
    files = [*(directory / name for name in (MODULES, SETTINGS, MORE)), *inner]
    return [file.relative_to(directory) for file in files if file.is_file()]


def _modules(directory: Path) -> list[tuple[str, str]]:
    """Kind and path of each module, in their order."""
    file = directory / MODULES
    try:
        modules = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        found = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a list of modules, each with a type and a path: {error!r}") from error
    for kind, path in found:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{file}: the path {path!r} of {kind} leads out of the directory")
    return found


def _pooling(file: Path) -> tuple[str, ...]:
    """The names in a pooling's configuration, which has one name or a flag a name."""
    values = read_json(file)
    if not values.pop("include_prompt", True):
        raise ValueError(f"{file}: include_prompt=false is not supported, only true")
    if isinstance(name := values.get("pooling_mode"), str):
        return (name,)
    if unknown := [name for name, on in values.items() if on and name.startswith("pooling_mode") and name not in FLAGS]:
        raise ValueError(f"{file}: {', '.join(unknown)} is not known; known are {', '.join(FLAGS)}")
    return tuple(name for flag, name in FLAGS.items() if values.get(flag, name == "mean"))


def embed(
    model: Any, tokenizer: BaseTokenizer, texts: Sequence[str], recipe: Recipe | None = None, *, batch_size: int = 32
) -> Tensor:
    """Vectors (n, d) of texts, fp32 on the CPU, by an encoder or a decoder. What is too long is cut, with a warning."""
    recipe = recipe or Recipe()
    return pool(model, token_rows(model, tokenizer, texts, recipe), recipe, batch_size)


def token_rows(model: Any, tokenizer: BaseTokenizer, texts: Sequence[str], recipe: Recipe) -> list[list[int]]:
    """The ids of each text with its prompt and the tokens that the model expects around it, cut to what it takes."""
    limit = min(recipe.max_tokens or model.config.max_positions, model.config.max_positions)
    rows, cut = [], []
    for number, text in enumerate(texts, 1):
        text = recipe.prompts.get(recipe.prompt or "", "") + text.strip()
        text = text.lower() if recipe.lowercase else text
        ids = tokenizer.encode(text, add_special_tokens=True)
        if not ids:
            raise ValueError(f"text {number} ({text!r}) has no tokens, so it has no vector")
        if len(ids) > limit:
            cut.append(f"{number} ({len(ids)} tokens)")
            ids = _cut(ids, tokenizer.encode(text), limit)
        rows.append(ids)
    if cut:
        log.warning("only the first %d tokens count of text %s", limit, ", ".join(cut))
    return rows


def _cut(ids: list[int], text: list[int], limit: int) -> list[int]:
    """Shortens the text; what stands around it in `ids` stays."""
    around = len(ids) - len(text)
    start = next(i for i in range(around + 1) if ids[i : i + len(text)] == text)
    return [*ids[:start], *text[: max(limit - around, 0)], *ids[start + len(text) :]]


@torch.inference_mode()
def pool(model: Any, rows: Sequence[Sequence[int]], recipe: Recipe, batch_size: int = 32) -> Tensor:
    """Vectors of rows of token ids. Rows of like lengths run together."""
    device, pad = model.embedding.weight.device, model.config.pad_id or 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        lengths = torch.tensor([len(rows[i]) for i in batch])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(real.shape, pad)
        ids[real] = torch.tensor([token for i in batch for token in rows[i]])
        ids, real = ids.to(device), real.to(device)
        # a causal model sees nothing of the padding behind a row
        h = model.hidden(ids) if model.causal else model.hidden(ids, mask=real)
        vectors = torch.cat([POOLINGS[name](h.float(), real[..., None].float()) for name in recipe.pooling], -1)
        vectors = F.normalize(vectors) if recipe.normalize else vectors
        found |= zip(batch, vectors.cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(rows))])
