"""How a source's tokens become the target's."""

from typing import Literal

from rayfuse.config.base import Settings


class AlignSettings(Settings):
    """How a source's tokens become the target's."""

    method: Literal["bytes", "exact", "min_edit_distance", "cooccurrence"] = "bytes"
    """`bytes`: positions that start at the same byte, entries that spell the same bytes, or begin
    with them. `exact`: one source token for one target token, of the same bytes; the rest is tail.
    `min_edit_distance`: FuseLLM's minimum edit distance. `cooccurrence`: FuseChat's, the target
    token that the corpus shows most often."""
