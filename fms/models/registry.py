"""The families that exist: an architecture, its variants, and what builds each."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fms.utils.config import ModelConfig
from fms.utils.serialization.checkpoint import Checkpoint
from fms.utils.serialization.errors import CheckpointError, nearest

Factory = Callable[..., Any]  # overrides of the configuration to a module
# may differ between a variant and a directory, as logits stay
UNLIKE = {"max_expected_seq_len", "pad_id", "p_dropout", "attn_dropout", "head_dropout", "labels", "pooler"}
_FACTORIES: dict[str, dict[str, Factory]] = {}


def register_model(architecture: str, variant: str, factory: Factory) -> None:
    """Make `get_model(architecture, variant)` call `factory(**overrides)`, which returns a module with a `config`.

    The first variant of an architecture is also what a checkpoint directory's own configuration overrides, every field
    of it. Raises `KeyError` if the pair is taken.
    """
    variants = _FACTORIES.setdefault(architecture, {})
    if variant in variants:
        raise KeyError(f"{architecture} {variant} is registered already")
    variants[variant] = factory


def register_variants(architecture: str, model: Factory, variants: Mapping[str, ModelConfig]) -> None:
    """`register_model` for each row of a table of configurations."""
    for variant, config in variants.items():
        register_model(architecture, variant, partial(model, config))


def list_models() -> list[str]:
    """The names of all architectures."""
    return list(_FACTORIES)


def list_variants(architecture: str) -> list[str]:
    """The names of an architecture's variants. Raises `KeyError` if there is no such architecture."""
    if architecture not in _FACTORIES:
        hint = " (a path is model_path=...)" if "/" in str(architecture) else nearest(architecture, _FACTORIES)
        raise KeyError(f"no architecture {architecture!r}{hint}; there are {', '.join(_FACTORIES)}")
    return list(_FACTORIES[architecture])


def build(architecture: str, variant: str, overrides: Mapping[str, Any]) -> Any:
    """The module, on the current default device. Raises `KeyError` if there is no such model."""
    variants = list_variants(architecture)
    if variant not in variants:
        raise KeyError(
            f"{architecture} has no variant {variant!r}{nearest(variant, variants)}; it has {', '.join(variants)}"
        )
    model = _FACTORIES[architecture][variant](**overrides)
    model.architecture = architecture
    return model


def describe(checkpoint: Checkpoint, variant: str | None, overrides: Mapping[str, Any]) -> Any:
    """The module that a checkpoint's own configuration asks for, or its variant if it carries none.

    Raises `CheckpointError` if neither is there, or if both are and differ in what the logits depend on.
    """
    architecture, fields = checkpoint.architecture, checkpoint.fields
    if fields is None:
        if variant is None:
            raise CheckpointError(
                f"{checkpoint.path} carries no configuration: name a variant of {architecture}: "
                f"{', '.join(list_variants(architecture))}"
            )
        return build(architecture, variant, overrides)
    model = build(architecture, list_variants(architecture)[0], fields | dict(overrides))
    if variant is not None:
        asked = build(architecture, variant, overrides).config.as_dict()
        there = model.config.as_dict()
        unlike = [f"{n}={asked[n]!r} ({there[n]!r})" for n in asked if asked[n] != there[n] and n not in UNLIKE]
        if unlike:
            raise CheckpointError(
                f"{checkpoint.path} is not the variant {variant!r}, which has {', '.join(unlike)} (there: in brackets)"
            )
    return model
