"""How a source's tokens become the target's, and the registry of alignment methods."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rayfuse.config.base import Settings, check_known, later_setting


@dataclass(frozen=True)
class AlignMethod:
    """The facts about an alignment method that are needed before its code is loaded."""

    module: str
    """The module with `METHOD`, an `align.method.Method`. It is imported when the method is used,
    so that a recipe can be read without the libraries that the method needs."""
    stored_map: Literal["per_pair", "per_corpus"] | None = None
    """The vocabulary map takes long to compute, so it is stored: once per pair of tokenizers, or
    once per pair and corpus. None: the map is computed wherever it is needed."""
    has_signal_at_boundaries: bool = True
    """Positions have a signal exactly where tokens of source and target start at one byte."""
    can_look_inside: bool = False
    """`align.inside_tokens` follows from the method's rule, equal bytes or their first token."""


METHODS = {
    "bytes": AlignMethod("rayfuse.align.methods.same_bytes", can_look_inside=True),
    "exact": AlignMethod("rayfuse.align.methods.exact", has_signal_at_boundaries=False),
    "min_edit_distance": AlignMethod(
        "rayfuse.align.methods.min_edit_distance", "per_pair", has_signal_at_boundaries=False
    ),
    "cooccurrence": AlignMethod("rayfuse.align.methods.cooccurrence", "per_corpus"),
}
"""Every alignment method by its name. A new one is one module and one line here."""


def _check_method(name: str) -> str:
    return check_known(name, METHODS)


class AlignSettings(Settings):
    """How a source's tokens become the target's."""

    method: Annotated[
        str, AfterValidator(_check_method), Field(json_schema_extra={"enum": [*METHODS]})
    ] = "bytes"
    """`bytes`: positions that start at the same byte learn from each other; an entry goes to the
    target token of the same bytes, or to the first target token of these bytes. `exact`: one source
    token for one target token of the same bytes; all other mass goes to the tail.
    `min_edit_distance`: FuseLLM's minimum edit distance. `cooccurrence`: FuseChat's, the target
    token that the source token meets most often in the corpus."""
    inside_tokens: bool = later_setting(False)
    """Give a signal also to target positions that start inside a source token, for method `bytes`:
    of the source's distribution at the token's start, the tokens that begin with the text up to the
    position, divided by their sum. A position is skipped if less than half of that sum has a known
    target token. It matters most for code, where sources often have longer tokens than the target.
    """

    @model_validator(mode="after")
    def _check_inside(self) -> "AlignSettings":
        if self.inside_tokens and not METHODS[self.method].can_look_inside:
            fitting = [name for name, facts in METHODS.items() if facts.can_look_inside]
            raise ValueError(
                f"inside_tokens is true, but method {self.method} has no rule for positions inside "
                f"source tokens; use method {' or '.join(fitting)}, or inside_tokens false"
            )
        return self
