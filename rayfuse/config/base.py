"""The base of all settings classes: common checks, and which settings affect the result."""

import linecache
import re
import traceback
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from rayfuse.config.addresses import has_secrets, mask_secrets
from rayfuse.config.text import show_controls

Share = Annotated[float, Field(ge=0, le=1)]

UNUSABLE_PATTERN = re.compile("[\x00\ud800-\udfff]")

BASELINE_ONLY: dict[str, Any] = {"baseline_only": True}
"""Extra of a setting that only CLM has, in place of another one, which fingerprints have then."""

FUSION_ONLY: dict[str, Any] = {"fusion_only": True}
"""`json_schema_extra` of a setting that a training without fusion (the CLM baseline) ignores."""

T = TypeVar("T")


class UserError(ValueError):
    """Something that a user or a file gave is wrong: the command ends with exit code 2.

    The message names the setting or the file, its value, what is valid, and the remedy.
    """

    def _render_traceback_(self) -> list[str]:
        """Show the message and the caller's line, which IPython does in place of a traceback."""
        caller = ""
        for frame, line in traceback.walk_tb(self.__traceback__):
            if str(frame.f_globals.get("__name__")).partition(".")[0] == "rayfuse":
                break
            caller = f"{line} {linecache.getline(frame.f_code.co_filename, line).rstrip()}"
        message = f"{type(self).__name__}: {show_controls(mask_secrets(str(self)))}"
        return [f"----> {caller}", "", message] if caller else [message]


def check_known(name: str, registry: Collection[str]) -> str:
    """Check that a name is registered, for settings with a registry in place of a `Literal`.

    Raises:
        ValueError: It is not; the message lists the registered names.
    """
    if name not in registry:
        *others, last = (repr(known) for known in registry)
        raise ValueError(f"input should be {', '.join(others)} or {last}")
    return name


def first_line(error: BaseException) -> str:
    """Shorten an error to the first line of its message, or to its class if it has none.

    Credentials are masked: a library's error may contain the address that it was given.
    """
    return mask_secrets((str(error).strip() or type(error).__name__).splitlines()[0])


@contextmanager
def user_error_from(explain: Callable[[Exception], UserError]) -> Generator[None]:
    """Replace any error inside by the UserError that `explain` makes of it.

    For calls into libraries that raise errors of many types without a common base class. Those in
    Rust (tokenizers) raise a `PanicException`, which is no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception):
            raise explain(error) from error
        if type(error).__name__ != "PanicException":
            raise
        raise explain(RuntimeError(str(error))) from error


def result_neutral(default: T) -> T:
    """Declare a setting that changes how a run proceeds (speed, cost, logs), never its result.

    Fingerprints exclude it, so a run that resumes with another value keeps what it has computed.
    Every other setting affects the result.
    """
    return Field(default=default, json_schema_extra={"affects_result": False})


def later_setting(default: T) -> T:
    """Declare a setting that affects the result, and was added after there were results.

    At its default, which computes what was computed before, fingerprints omit it: they stay valid.
    """
    return Field(default=default, json_schema_extra={"omits_default": True})


def affects_result(field: FieldInfo) -> bool:
    """Look up whether fingerprints include a setting; true unless it is declared otherwise."""
    return bool(_extra_of(field).get("affects_result", True))


def is_fusion_only(field: FieldInfo) -> bool:
    """Look up whether a training without fusion ignores a setting."""
    return bool(_extra_of(field).get("fusion_only", False))


def _is_omitted(field: FieldInfo, value: Any) -> bool:
    return bool(_extra_of(field).get("omits_default", False)) and value == field.default


def _extra_of(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return cast(dict[str, Any], extra) if isinstance(extra, dict) else {}


def _list_texts(value: Any) -> list[str]:
    """List a value's strings: itself, its items or its keys; sections check their own."""
    if isinstance(value, str):
        return [value]
    items = cast(Collection[Any], value) if isinstance(value, tuple | list | dict) else ()
    return [item for item in items if isinstance(item, str)]


class Settings(BaseModel):
    """One section of the recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _check_characters(cls, value: Any) -> Any:
        for text in _list_texts(value):
            if UNUSABLE_PATTERN.search(text):
                raise ValueError("contains a NUL byte or an unpaired surrogate; remove it")
            if has_secrets(text):
                raise ValueError(
                    "contains credentials; remove them: recipes are stored beside the data. Use "
                    "an instance role, or AWS_PROFILE and the like"
                )
        return value

    def dump_result_settings(self, *, with_fusion: bool = True) -> dict[str, Any]:
        """Dump the settings that affect the result as plain JSON values, for fingerprints.

        Args:
            with_fusion: Also those that a training without fusion ignores.
        """
        excluded = {
            name
            for name, field in type(self).model_fields.items()
            if not affects_result(field)
            or (is_fusion_only(field) and not with_fusion)
            or bool(_extra_of(field).get("baseline_only", False))
            or _is_omitted(field, getattr(self, name))
        }
        return self.model_dump(mode="json", by_alias=True, exclude=excluded)
