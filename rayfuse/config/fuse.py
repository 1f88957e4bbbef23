"""How several aligned sources become one distribution, and the registry of fusion rules."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rayfuse.config.base import Settings, check_known, later_setting

RULES = {
    "min_ce": "rayfuse.fuse.rules:take_selected",
    "avg_ce": "rayfuse.fuse.rules:average",
    "fixed_share": "rayfuse.fuse.rules:average_by_posterior",
}
"""Every fusion rule by its name, as module:function, a `fuse.rules.FusionRule`. A new one is one
function and one line here. It is imported when rows are read, so that a recipe can be read without
the libraries that the rule needs."""

POSTERIOR_RULES = ("fixed_share",)
"""Rules that compare sources by the text before each position, not by a unit of text around it."""


def _check_rule(name: str) -> str:
    return check_known(name, RULES)


class FuseSettings(Settings):
    """How several aligned sources become one distribution."""

    method: Annotated[
        str, AfterValidator(_check_rule), Field(json_schema_extra={"enum": [*RULES]})
    ] = "min_ce"
    """`min_ce`: the source with the lowest cross-entropy; `avg_ce`: a mean weighted by it;
    `fixed_share`: a mean weighted by how well each source predicted the text before."""
    switch_rate: Annotated[float, Field(gt=0, lt=1)] = later_setting(0.05)
    """Share of the weights of `fixed_share` that returns to the prior with each token: how fast the
    best source may change within a document."""
    unit: Literal["row", "document", "span", "token"] = "row"
    """The text that one choice is made for: a row, all rows of a document that no source rejected,
    a window of `span_tokens` target tokens around each position, or each token by itself."""
    span_tokens: PositiveInt = 32
    """Width of the window of the unit `span`: half of it to each side of the position's own token,
    limited to the row."""
    cost: Literal["nats_per_byte", "nats_per_token"] = "nats_per_byte"
    """The unit of the cost that sources are compared by. Nats per token, as in the papers, favours
    finer tokenizers."""
    temperature: PositiveFloat = 1.0
    """Temperature of the `avg_ce` weights, softmax(-cost / temperature)."""
    weights: dict[str, NonNegativeFloat] = Field(default_factory=dict[str, NonNegativeFloat])
    """Factors on the weights of `avg_ce`, and the prior of `fixed_share`, by source; 0 excludes the
    source. Default 1."""
    skip_noise: bool = True
    """Skip a source that predicts nearly no row 10 % better than chance, ln V nats per token: its
    weights or its tokenizer must be wrong."""
    tail: Literal["bucket", "truth", "renormalise"] = "bucket"
    """`bucket`: the mass outside the top k is one more outcome. `truth`: it goes to the token that
    really comes next. `renormalise`: it is dropped and the top k scaled up to 1, as in the papers.
    """

    @property
    def uses_posterior(self) -> bool:
        """Whether the rule weighs sources by their posterior from the text so far."""
        return self.method in POSTERIOR_RULES

    @model_validator(mode="after")
    def _check_cost(self) -> "FuseSettings":
        if self.cost == "nats_per_token" and self.unit in ("span", "token"):
            raise ValueError(
                f"cost nats_per_token is not defined for unit {self.unit}, where sources have no "
                "complete tokens; use unit row or document, or cost nats_per_byte"
            )
        if self.uses_posterior and self.unit != "row":
            raise ValueError(
                f"unit {self.unit} has no meaning for method {self.method}, which weighs the "
                "sources at every token; remove unit, or use method avg_ce"
            )
        if self.uses_posterior and self.cost != "nats_per_byte":
            raise ValueError(
                f"cost {self.cost} has no meaning for method {self.method}, which compares "
                "probabilities of the same text; remove cost, or use method avg_ce"
            )
        return self
