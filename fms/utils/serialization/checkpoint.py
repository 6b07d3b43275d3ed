"""A checkpoint found and understood: its format, its architecture, its configuration."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fms.utils.serialization.errors import CheckpointError, nearest
from fms.utils.serialization.readers import Reader, open_reader
from fms.utils.serialization.sources import find_by_kind, get_source, known_kinds, known_sources
from fms.utils.serialization.tables import Part, Rule, match

OWN_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk. `fields` is the configuration in our names, `None` where the format carries none."""

    path: Path
    source: str
    architecture: str
    fields: dict[str, Any] | None
    reader: Reader

    def parts(self, config: Any) -> tuple[dict[str, Part], list[str]]:
        """Where each parameter comes from, and the keys that are left over."""
        if self.source == "own":
            return {key: Part(key) for key in list(self.reader.keys())}, []
        return match(self.rules, self.reader.keys(), config)

    @property
    def rules(self) -> list[Rule]:
        return list(get_source(self.architecture, self.source).rules)


def open_checkpoint(path: str | Path, source: str | None = None, architecture: str | None = None) -> Checkpoint:
    """Look at a file, a directory or a Hub id (`org/name`) without reading weights.

    The format and the architecture come from what is there unless they are given. Raises `CheckpointError` if they
    can't be told, or if a field of the configuration is not understood.
    """
    path = local_path(path)
    values: dict[str, Any] | None = None
    reader = open_reader(path)
    found, config_file = _detect(path, reader)
    if source is None:
        source = found
    if source is None:
        raise CheckpointError(f"{path}: can't tell its format from its {len(list(reader.keys()))} keys: name a source")
    if source == found == "own":
        own = _json(config_file)
        if own.get("version") != OWN_VERSION:
            raise CheckpointError(f"{config_file}: version {own.get('version')!r}, this library reads {OWN_VERSION}")
        if missing := [name for name in ("architecture", "config") if name not in own]:
            raise CheckpointError(f"{config_file} has no {', '.join(map(repr, missing))}")
        _agree(path, architecture, own["architecture"])
        return Checkpoint(path, source, own["architecture"], own["config"], reader)
    if source == found:
        values, kind = _values(source, config_file, reader)
        if kind is not None:
            classes = values.get("architectures") if values and source == "hf" else None
            model_class = classes[0] if classes else None
            named = find_by_kind(source, kind, model_class)
            fit = [name for name, of_class in named.items() if of_class]
            if not fit and architecture not in named:
                known, absent = known_kinds(source), str(model_class if named else kind)
                raise CheckpointError(
                    f"{config_file}: architecture {absent!r} is not one that this library has"
                    f"{nearest(absent, known)}; it has {', '.join(known)}"
                )
            if architecture not in named:  # of one kind another head may be asked for than the file has
                _agree(path, architecture, fit[0])
                architecture = fit[0]
    if architecture is None:
        if source not in (known := known_sources()):
            raise CheckpointError(
                f"source={source!r} is not known{nearest(source, known)}; known are {', '.join(known)}"
            )
        raise CheckpointError(f"{path}: {source} files do not say which model they are: give architecture and variant")
    if source == "own":
        return Checkpoint(path, source, architecture, None, reader)
    entry = get_source(architecture, source)
    fields = None
    if values is not None and entry.config is not None:
        fields = entry.config.read(values, str(config_file)) | entry.config.of_names(list(reader.keys()))
    return Checkpoint(path, source, architecture, fields, reader)


def local_path(path: str | Path) -> Path:
    """The path itself if it exists, else where the Hub's snapshot of `org/name[@revision]` lies, fetched if need be."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    name, _, revision = str(path).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or local.suffix in (".gguf", ".pth", ".safetensors"):
        raise CheckpointError(f"{path}: no such file or directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))

    try:
        found = fetch(["*.json", "*.safetensors", "*.model", "*.jinja"])
        if not any(found.glob("*.safetensors")):
            found = fetch(["*.json", "*.bin", "*.model", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a file or directory here, and not to be had from the Hub: {error}"
        ) from error
    return found


def read_configuration(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The architecture that a Hugging Face directory's or Hub id's `config.json` names, and its fields in our names.

    Needs no weights. Raises `CheckpointError` as `open_checkpoint` does.
    """
    file = Path(path).expanduser() / "config.json"
    if not file.parent.exists():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(str(path), "config.json"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(f"{path}: not a directory here, and not to be had from the Hub: {error}") from error
    values = _json(file)
    kind, classes = str(values.get("model_type")), values.get("architectures") or [None]
    fit = [name for name, of_class in find_by_kind("hf", kind, classes[0]).items() if of_class]
    config = get_source(fit[0], "hf").config if fit else None
    if config is None:
        known = known_kinds("hf")
        raise CheckpointError(
            f"{file}: architecture {classes[0] or kind!r} is not one that this library has{nearest(kind, known)}; "
            f"it has {', '.join(known)}"
        )
    return fit[0], config.read(values, str(file))


def _detect(path: Path, reader: Reader) -> tuple[str | None, Path]:
    """The format, and the file that holds its configuration."""
    if reader.files[0].suffix == ".gguf":
        return "gguf", reader.files[0]
    directory = path if path.is_dir() else path.parent
    keys = list(reader.keys())
    if any(key.startswith("base_model.") for key in keys):
        return "fms", path
    if (config := directory / "config.json").exists():
        return ("own" if _json(config).get("format") == "fms" else "hf"), config
    if (config := directory / "params.json").exists():
        return "meta", config
    return None, path


def _values(source: str, file: Path, reader: Reader) -> tuple[dict[str, Any] | None, str | None]:
    """The format's own configuration and the name that it gives the architecture."""
    shapes = {key: reader.shape(key) for key in list(reader.keys())}
    if source == "hf":
        values = _json(file)
        if (kind := values.get("model_type")) is None:
            raise CheckpointError(f"{file} has no 'model_type'; known are {', '.join(known_kinds(source))}")
        return values, kind
    if source == "meta":
        values = _json(file) | {
            "vocab_size": _shape(shapes, "tok_embeddings.weight", file)[0],
            "hidden_dim": _shape(shapes, "layers.0.feed_forward.w1.weight", file)[0],
            "tied": "output.weight" not in shapes or _same_rows(reader, "output.weight", "tok_embeddings.weight"),
        }
        return values, "llama"
    if source == "gguf":
        metadata: Mapping[str, Any] = reader.metadata  # type: ignore[attr-defined]
        kind = str(metadata.get("general.architecture"))
        values = {k.removeprefix(f"{kind}."): _decimal(v) for k, v in metadata.items() if k.startswith(f"{kind}.")}
        values |= {
            "vocab_size": _shape(shapes, "token_embd.weight", file)[0],
            "tied": "output.weight" not in shapes,
            "attn_bias": "blk.0.attn_q.bias" in shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in shapes,
            "rope_freqs": reader.read("rope_freqs.weight") if "rope_freqs.weight" in shapes else None,
        }
        return values, kind
    return None, None


def _decimal(value: Any) -> Any:
    """A number of fp32 as it was written: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value


def _same_rows(reader: Reader, one: str, other: str) -> bool:
    """Whether two tables begin with the same rows: then they are one, written twice."""
    return reader.read(one, (slice(0, 4),)).equal(reader.read(other, (slice(0, 4),)))


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, file: Path) -> tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(f"{file.parent if file.suffix == '.json' else file}: there is no {key}")
    return shapes[key]


def _agree(path: Path, given: str | None, found: str) -> None:
    if given not in (None, found):
        raise CheckpointError(f"{path} holds {found!r}, not {given!r} as was asked for")


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values
