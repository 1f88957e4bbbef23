"""Chat templates as programs: where they stand, and Jinja in a sandbox, as in `transformers`."""

import json
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rayfuse.config.base import UserError, first_line
from rayfuse.models.folder import TEMPLATE_FILE, is_inline_template, read_json_object

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


def read_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; older folders name special tokens in a file of their own."""
    paths = [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    config: dict[str, Any] = {}
    for path in paths:
        config |= read_json_object(path) if path.is_file() else {}
    return config


def read_template(folder: Path, config: dict[str, Any], given: str | None, model: str) -> str:
    """Read the template that the recipe gives or names, or the model's own.

    Raises:
        UserError: There is none, or the file cannot be read.
    """
    if given is not None and is_inline_template(given):
        return given
    path = folder / TEMPLATE_FILE if given is None else Path(given).expanduser()
    if given is not None or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"chat_template is {str(path)!r}, which cannot be read ({first_line(error)}); name "
                "a file with a Jinja template"
            ) from error
    own = config.get("chat_template")
    if isinstance(own, list):  # several by name
        own = {entry.get("name"): entry.get("template") for entry in own}.get("default")
    if not isinstance(own, str):
        raise UserError(
            f"model {model!r} has no chat template, and the documents are conversations; set "
            "chat_template to a file with the Jinja template that it was trained with, or use the "
            "instruct version of the model"
        )
    return own
