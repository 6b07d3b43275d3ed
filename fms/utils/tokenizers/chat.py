"""Chat templates: Jinja as transformers renders it, in a sandbox: a template is a stranger's program."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The text of a chat. `ValueError` with the template's own words where it refuses the messages or is broken."""
    from jinja2 import TemplateError

    plain = json.loads(json.dumps(list(messages)))  # a template sees data only, no objects with methods
    try:
        return _compile(template).render(messages=plain, **{"tools": None, "documents": None, **variables})
    except (TemplateError, TypeError, OverflowError) as error:
        raise ValueError(f"the chat template failed: {error or type(error).__name__}") from error


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is just text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """Jinja's `namespace`, without the attributes by which a template could reach out of the sandbox."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's own, so that `self` can be an attribute
            self, *rest = args
            Namespace.__init__(self, dict(*rest, **kwargs))
            for name in dict(*rest, **kwargs):
                _check_name(name)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a chat template may not set {name!r} on a namespace")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = PlainNamespace
    return environment.from_string(template)
