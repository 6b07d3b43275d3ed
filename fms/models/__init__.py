"""Models by name: `get_model("llama", "7b", path)`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fms.models import (  # noqa: F401  (they register themselves)
    bert,
    gpt_bigcode,
    granite,
    granite4,
    llama,
    mistral,
    mixtral,
    qwen3,
    roberta,
)
from fms.models.compile import check_mode, compile_model
from fms.models.decoder import Decoder
from fms.models.freeze import freeze
from fms.models.registry import build, describe, list_models, list_variants, register_model
from fms.utils.devices import device_of, dtype_of
from fms.utils.serialization.checkpoint import Checkpoint, open_checkpoint, read_configuration
from fms.utils.serialization.errors import CheckpointError, nearest
from fms.utils.serialization.generation_config import generation_defaults
from fms.utils.serialization.loading import common_dtype, fill, plan

__all__ = ["Decoder", "freeze", "get_model", "list_models", "list_variants", "register_model"]

STRATEGIES = ("none", "tp")
PRETRAINED, CONFIGURED = "hf_pretrained", "hf_configured"


def get_model(
    architecture: str | None = None,
    variant: str | None = None,
    model_path: str | Path | None = None,
    source: str | None = None,
    device_type: str = "cpu",
    data_type: str | torch.dtype | None = None,
    distributed_strategy: Any = None,
    group: Any = None,
    *,
    tp_plan: Mapping[str, str] | None = None,
    sequence_parallel: bool = False,
    strict: bool = True,
    check_finite: bool = False,
    compile: str = "none",
    **overrides: Any,
) -> Any:
    """A model that can be trained, with random weights or a checkpoint's. `freeze` makes it the inference form.

    `model_path` is a file, a directory or a Hub id; what it says of itself (format, architecture, configuration) need
    not be given: `get_model(model_path=DIR)` is enough. `source` is the format, where it can't be told. `data_type`
    defaults to the checkpoint's own (GGUF: fp32 on a CPU, bf16 on a GPU), or to torch's default. `strict=False` leaves
    out what the checkpoint has too much or too little. `check_finite` looks for NaN and infinity. `overrides` are
    fields of the configuration.

    `distributed_strategy` is "none", "tp" (tensor parallel over the ranks of `group`, a process group or a mesh of
    one dimension or with an axis called tp, or over all; `tp_plan` changes words of the model's plan,
    `sequence_parallel` makes them share out the tokens between sub-layers too), or an object whose `place(model)` is
    called with the model on the meta device. Started by torchrun it is "tp" by itself.

    `compile` is "none", "blocks" or "max", as for `compile_model`.

    The architecture "hf_pretrained" is whatever a Hugging Face directory (as `model_path`) or Hub id (as `variant`)
    holds; "hf_configured" is the same with random weights, of a directory or Hub id as `variant`.

    Raises `ValueError` or `KeyError` for what is not known, naming the nearest choice.
    """
    check_mode(compile)
    if architecture in (PRETRAINED, CONFIGURED):
        if architecture == PRETRAINED and ((variant is None) == (model_path is None) or source is not None):
            raise ValueError(
                f"{PRETRAINED} takes either a Hub id as variant or a directory as model_path, and no source"
            )
        if architecture == CONFIGURED and (variant is None or model_path is not None):
            raise ValueError(f"{CONFIGURED} takes a directory or a Hub id as variant, and no model_path")
        if architecture == PRETRAINED:
            architecture, variant, model_path = None, None, model_path or variant
        else:
            architecture, fields = read_configuration(str(variant))
            variant, overrides = None, fields | overrides
    strategy, device = _strategy(distributed_strategy, group, tp_plan, sequence_parallel, device_type)
    dtype = dtype_of(data_type)
    if model_path is None:
        if architecture is None:
            raise ValueError("give an architecture (and a variant), or a model_path that tells")
        if source is not None:
            raise ValueError(f"source={source!r} is the format of a model_path, and there is none")
        with torch.device("meta"):
            model = build(architecture, variant or list_variants(architecture)[0], overrides)
            if strategy is not None:
                strategy.place(model)
        model.to(dtype or torch.get_default_dtype()).to_empty(device=device)
        model.tie_weights()
        model.reset_parameters()
        return compile_model(model, compile)

    if architecture is not None:
        list_variants(architecture)
    checkpoint = open_checkpoint(model_path, source, architecture)
    with torch.device("meta"):
        model = describe(checkpoint, variant, overrides)
        if strategy is not None:
            strategy.place(model)
    try:
        parts = plan(model, checkpoint, strict)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_fitting(checkpoint)}") from None
    dtype = dtype or common_dtype(parts, checkpoint.reader, device)
    if len(parts) < len(list(model.parameters())):  # not strict: what nothing fills is random
        model.to(dtype).to_empty(device=device)
        model.reset_parameters()
    fill(model, parts, checkpoint.reader, dtype, device, check_finite)
    model.tie_weights()
    model.generation_defaults = generation_defaults(checkpoint)
    return compile_model(model, compile)


def _strategy(
    asked: Any, group: Any, plan: Mapping[str, str] | None, sequence_parallel: bool, device_type: str
) -> tuple[Any, torch.device]:
    """An object that places models, or none, and this process's device."""
    if not isinstance(asked, str | None):
        return asked, device_of(device_type)
    if asked and asked not in STRATEGIES:
        raise ValueError(
            f"distributed_strategy={asked!r} is not known{nearest(asked, STRATEGIES)}; "
            f"there are {', '.join(STRATEGIES)}"
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if asked == "none" or not (asked or started or group is not None):
        if plan or sequence_parallel or group is not None:
            raise ValueError("tp_plan, sequence_parallel and group are for distributed_strategy='tp'")
        return None, device_of(device_type)
    from fms.distributed.launch import launch
    from fms.distributed.strategy import TensorParallel, mesh_of

    device = launch(device_type)
    return TensorParallel(mesh_of(group, device), plan, sequence_parallel), device


def _fitting(checkpoint: Checkpoint) -> str:
    """Which variants this checkpoint would fit, as the end of an error."""
    fit = []
    for variant in list_variants(checkpoint.architecture):
        with torch.device("meta"):
            model = build(checkpoint.architecture, variant, {})
        try:
            plan(model, checkpoint)
        except CheckpointError:
            continue
        fit.append(variant)
    return f"\n  it fits {checkpoint.architecture} {', '.join(fit)}" if fit else ""
