"""Configurations of other formats, read and written by tables of fields beside each family."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fms.utils.serialization.errors import CheckpointError, nearest

Values = dict[str, Any]
REQUIRED = object()
Field = tuple[
    str, str, Any
]  # theirs, ours, the value where theirs is absent: a constant, a function of their values, or REQUIRED


@dataclass(frozen=True)
class ConfigMap:
    """How a family's configuration stands in a format.

    `kinds` are the values that name the family there (`model_type`, `general.architecture`); the first is written.
    `fields` are read and written as they are. `fixed` are fields of which we support these values only, absent ones
    having the first.
    `harmless` are known not to change the result, a trailing `*` standing for any ending.
    `read_more` takes what it understands out of their values and returns ours, `write_more` is its inverse.
    `classes` are those of transformers (`architectures`) that are this architecture, where one kind has several; with
    none it is every class's. `of_names` gives what only the names of the tensors tell.
    """

    kinds: tuple[str, ...]
    fields: Sequence[Field]
    fixed: Mapping[str, Sequence[Any]]
    harmless: frozenset[str]
    constants: Mapping[str, Any]
    read_more: Callable[[Values, Values], Values]
    write_more: Callable[[Any], Values]
    classes: tuple[str, ...] = ()
    of_names: Callable[[Iterable[str]], Values] = lambda names: {}

    def read(self, values: Values, where: str) -> Values:
        """Our fields. Raises `CheckpointError` on a field that is missing, not known, or of a value we do not have."""
        left = dict(values)
        ours: Values = {}
        known = [theirs for theirs, _, _ in self.fields] + list(self.fixed)
        for theirs, name, default in self.fields:
            value = left.pop(theirs, None)
            if value is None and default is REQUIRED:
                near = nearest(theirs, [name for name in values if name not in known and not self._is_harmless(name)])
                raise CheckpointError(f"{where} has no {theirs!r}{near}")
            if value is None:
                value = default(values) if callable(default) else default
            ours[name] = value
        try:
            ours |= self.read_more(left, ours)
        except KeyError as error:
            raise CheckpointError(f"{where} has no {error}") from None
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
        for name, allowed in self.fixed.items():
            if (value := left.pop(name, allowed[0])) not in allowed:
                raise CheckpointError(f"{where}: {name}={value!r} is not supported here, only {allowed[0]!r}")
        for name in left:
            if not self._is_harmless(name):
                raise CheckpointError(
                    f"{where}: field {name!r} (= {left[name]!r}) is not known for {self.kinds[0]}"
                    f"{nearest(name, known)}: it may change the result, so it is not ignored"
                )
        return ours

    def _is_harmless(self, name: str) -> bool:
        return any(name == h or (h.endswith("*") and name.startswith(h[:-1])) for h in self.harmless)

    def write(self, config: Any) -> Values:
        """Their fields for our configuration."""
        values = dict(self.constants)
        for theirs, name, _ in self.fields:
            values[theirs] = getattr(config, name)
        return values | self.write_more(config)
