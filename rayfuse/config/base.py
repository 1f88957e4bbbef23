"""What all parts of a recipe have in common."""

import re
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Share = Annotated[float, Field(ge=0, le=1)]

SECRET_PATTERN = re.compile(
    r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)"
    r"|(?<=[?&])[\w.-]*(?:sig|token|secret|password|credential|key)[\w.-]*=[^&\s'\"]+",
    re.IGNORECASE,
)
"""The name and the secret in an address that has them, before the host or as settings behind it."""

UNUSABLE_PATTERN = re.compile("[\x00\ud800-\udfff]")


class UserError(ValueError):
    """Something that a user or a file gave is wrong: the command ends with exit code 2.

    The message names the setting or the file, its value, what is valid, and the remedy.
    """


def check_known(name: str, registry: Collection[str]) -> str:
    """Check that a name is registered, for settings with a registry in place of a `Literal`.

    Raises:
        ValueError: It is not; the message lists the registered names.
    """
    if name not in registry:
        *others, last = (repr(known) for known in registry)
        raise ValueError(f"input should be {', '.join(others)} or {last}")
    return name


class Settings(BaseModel):
    """A part of the recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True
    )

    @field_validator("*")
    @classmethod
    def _check_characters(cls, value: Any) -> Any:
        if isinstance(value, str) and UNUSABLE_PATTERN.search(value):
            raise ValueError("remove the NUL or the half of a surrogate pair, no name can hold it")
        if isinstance(value, str) and SECRET_PATTERN.search(value):
            raise ValueError(
                "remove the credentials from the address: recipes are stored beside the data; "
                "machines have roles, and people AWS_PROFILE and the like"
            )
        return value
