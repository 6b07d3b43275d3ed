"""Which formats each architecture's checkpoints come in."""

from collections.abc import Sequence
from dataclasses import dataclass

from fms.utils.serialization.config_map import ConfigMap
from fms.utils.serialization.errors import CheckpointError, nearest
from fms.utils.serialization.tables import Rule


@dataclass(frozen=True)
class Source:
    """A weight table and, where the format carries a configuration, how to read it."""

    rules: Sequence[Rule]
    config: ConfigMap | None = None


_SOURCES: dict[str, dict[str, Source]] = {}


def register_source(architecture: str, source: str, rules: Sequence[Rule], config: ConfigMap | None = None) -> None:
    """Let `get_model(architecture, ..., source=source)` read by these rules. Raises `KeyError` if the name is taken."""
    sources = _SOURCES.setdefault(architecture, {})
    if source in sources or source == "own":
        raise KeyError(f"{architecture} has a source {source!r} already")
    sources[source] = Source(rules, config)


def list_sources(architecture: str) -> list[str]:
    """The formats that an architecture's checkpoints can be in; "own" is what `save_model` writes."""
    return [*_SOURCES.get(architecture, {}), "own"]


def known_sources() -> list[str]:
    """The formats of all architectures."""
    return list(dict.fromkeys(name for architecture in _SOURCES for name in list_sources(architecture)))


def get_source(architecture: str, source: str) -> Source:
    """Raises `CheckpointError` if the architecture has no such format."""
    known = list_sources(architecture)
    if source not in known or source == "own":
        raise CheckpointError(
            f"{architecture} has no checkpoints of source {source!r}{nearest(source, known)}; it has {', '.join(known)}"
        )
    return _SOURCES[architecture][source]


def find_by_kind(source: str, kind: str, model_class: str | None = None) -> dict[str, bool]:
    """The architectures that a format's configuration may mean by a kind (`model_type`, `general.architecture`), and
    whether they are the one of this class; without a class all are, and the first is the usual one."""
    found = {}
    for architecture, sources in _SOURCES.items():
        if source in sources and (config := sources[source].config) and kind in config.kinds:
            found[architecture] = model_class is None or not config.classes or model_class in config.classes
    return found


def known_kinds(source: str) -> list[str]:
    """All names of architectures that a format's configurations may have, and of classes where these decide."""
    configs = [config for sources in _SOURCES.values() if source in sources and (config := sources[source].config)]
    return list(dict.fromkeys(name for config in configs for name in (*config.kinds, *config.classes)))
