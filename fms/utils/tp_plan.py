"""Tensor-parallel plans: collected from the modules, checked, overridden, printed."""

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from fms.modules.tp import WORDS, Plan


def plan_for(model: nn.Module, tp: int, overrides: Mapping[str, str] | None = None) -> Plan:
    """The word of each module, by its full name: what the modules say of their parts, the outer before the inner.

    `overrides` change words; in their names `*` stands for anything, as in `layers.*.ff.experts`.

    Raises `ValueError` if the model can't be split over `tp` ranks, if an override names nothing or is no word, or if a
    module has parameters and no word.
    """
    plan: Plan = {}
    for prefix, module in model.named_modules():
        if hasattr(module, "tp_plan"):
            for name, word in module.tp_plan(tp).items():
                plan.setdefault(".".join(filter(None, (prefix, name))), word)
    for name, word in (overrides or {}).items():
        named = [known for known in plan if fnmatchcase(known, name)]
        if not named:
            near = get_close_matches(name, plan, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"tp_plan names {name!r}, which the plan has not{hint}")
        plan |= dict.fromkeys(named, word)
    for name, word in plan.items():
        if word not in WORDS:
            raise ValueError(f"tp_plan: {name} is {word!r}, which is not one of {', '.join(WORDS)}")
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and name not in plan:
            raise ValueError(f"tp_plan: {name or 'the model'} has parameters and no word")
    return plan


def pad_model(model: nn.Module, tp: int) -> list[str]:
    """Append zeros to heads and hidden channels that `tp` ranks could not share. Says what became of them."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "pad")]
    return list(dict.fromkeys(filter(None, [module.pad(tp) for module in modules])))


class Row(NamedTuple):
    """One parameter, or the same of every layer (`layers.*`), under a plan."""

    name: str
    word: str
    shape: tuple[int, ...]  # of the largest share
    layers: int  # that have it
    bytes: int  # a rank, of all of them


def table(model: nn.Module, plan: Plan, tp: int, itemsize: int) -> list[Row]:
    """What each rank of `tp` holds, `itemsize` bytes an element. The model may be on the meta device."""
    rows: dict[str, Row] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shape = list(parameter.shape)
        if (dim := WORDS[plan[owner]][1].get(leaf)) is not None:
            shape[dim] = -(-shape[dim] // tp)
        key = re.sub(r"\.\d+\.", ".*.", name)
        old = rows.get(key, Row(key, plan[owner], tuple(shape), 0, 0))
        rows[key] = old._replace(layers=old.layers + 1, bytes=old.bytes + math.prod(shape) * itemsize)
    return list(rows.values())


def collectives(plan: Plan) -> int:
    """All-reduces of a forward."""
    return sum(word in ("embed", "rowwise", "summed") for word in plan.values())
