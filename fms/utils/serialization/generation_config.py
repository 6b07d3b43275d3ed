"""What a checkpoint says of how to generate: `generation_config.json`, or the end tokens of its configuration."""

import json
import logging
from pathlib import Path
from typing import Any

from fms.utils.serialization.checkpoint import Checkpoint
from fms.utils.serialization.errors import CheckpointError

log = logging.getLogger(__name__)

FILE = "generation_config.json"
HONOURED = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("eos_token_id", "pad_token_id", "max_new_tokens"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that we do not have, and the values with which they do nothing
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "penalty_alpha": (0, 0.0),
    "diversity_penalty": (0, 0.0),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1, 1.0),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": (),
}


def generation_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments for `generate` that the checkpoint asks for. Logs a warning for what it asks and we do not have."""
    if checkpoint.source == "gguf":
        metadata: dict[str, Any] = checkpoint.reader.metadata  # type: ignore[attr-defined]
        named = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(token for token in named if token is not None))  # of a text, a turn, a message
        return {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    values = _read(directory / FILE)
    if "eos_token_id" not in values:
        values["eos_token_id"] = _read(directory / "config.json").get("eos_token_id")
    for name, value in values.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            log.warning("%s: %s=%r is not supported and left out", directory / FILE, name, value)
    return {name: value for name, value in values.items() if name in HONOURED and value is not None}


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values
