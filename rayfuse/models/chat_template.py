"""Chat templates as programs: Jinja in a sandbox, with what `transformers` gives them."""

import json
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, ClassVar

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

FIXED_DATE = datetime(2024, 7, 26, tzinfo=timezone.utc)
"""The date that templates may write: with today's, tokens would depend on the day."""


class _GenerationTag(Extension):
    """`{% generation %}`, by which some templates mark answers; it changes nothing."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> list[Node]:
        """Parse the block as what is in it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def compile_template(template: str) -> Template:
    """Compile a chat template in a sandbox, with the functions that `transformers` gives them.

    Raises:
        jinja2.TemplateError: It is no template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = FIXED_DATE.strftime
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Write JSON without escapes of HTML, which Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)
