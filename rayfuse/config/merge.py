"""How targets that were each fused with one source are merged, and the registry of methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
)

from rayfuse.config.base import Settings, Share, UserError, check_known


@dataclass(frozen=True)
class MergeMethod:
    """A merge method, and what recipes are checked against."""

    function: str
    """As module:function, a `merge.methods.MergeFunction`."""
    settings: tuple[str, ...] = ()
    """The settings of the section `merge` that it reads."""
    num_models: int | None = None
    """The only number of models that it is defined for; None if it merges any number."""


METHODS = {
    "linear": MergeMethod("rayfuse.merge.methods:average", ("weights",)),
    "slerp": MergeMethod("rayfuse.merge.methods:interpolate", ("t",), num_models=2),
    "task_arithmetic": MergeMethod("rayfuse.merge.methods:add_changes", ("weights", "scale")),
    "ties": MergeMethod("rayfuse.merge.methods:average_agreeing", ("weights", "density")),
    "dare": MergeMethod("rayfuse.merge.methods:average_dropped", ("weights", "density", "seed")),
    "varm": MergeMethod("rayfuse.merge.methods:average_by_change"),
    "sce": MergeMethod("rayfuse.merge.methods:average_selected", ("tau",)),
}
"""Every merge method by its name. A new one is one function and one line here. It is imported when
models are merged, so that a recipe can be read without torch."""


def _check_method(name: str) -> str:
    return check_known(name, METHODS)


MethodName = Annotated[
    str, AfterValidator(_check_method), Field(json_schema_extra={"enum": [*METHODS]})
]

PositiveShare = Annotated[float, Field(gt=0, le=1)]


class MergeSettings(Settings):
    """How `rayfuse merge` merges targets that were each fused with one source (FuseChat)."""

    methods: Annotated[tuple[MethodName, ...], Field(min_length=1)] | None = None
    """The merges to make and compare: `linear`, `slerp` (of two models), `task_arithmetic`, `ties`,
    `dare`, `varm`, `sce`; by default all that fit the number of sources."""
    weights: dict[str, NonNegativeFloat] = Field(default_factory=dict[str, NonNegativeFloat])
    """Weights of the targets by the source that they were fused with, for `linear`,
    `task_arithmetic`, `ties` and `dare`; default 1. All but `task_arithmetic` normalise them."""
    t: Share = 0.5
    """`slerp`: 0 gives the first source's target, 1 the second's."""
    scale: PositiveFloat = 0.3
    """`task_arithmetic`: the factor on the weighted sum of the changes; FuseChat has 0.3."""
    density: PositiveShare = 0.6
    """`ties`: the share of each target's changes that is kept, the largest ones; `dare`: the
    probability with which each is kept."""
    tau: PositiveShare = 0.1
    """`sce`: the share of a matrix's elements that is selected, those whose change varies most
    between the targets."""
    seed: NonNegativeInt = 0
    """`dare`: the seed of the elements that are dropped."""

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, methods: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in methods or ():
            if (methods or ()).count(name) > 1:
                raise ValueError(f"the method {name!r} is listed twice; remove one")
        return methods

    def choose_methods(self, num_models: int) -> tuple[str, ...]:
        """List the methods to merge by.

        Args:
            num_models: The number of models to merge.

        Raises:
            UserError: A given method is not defined for this number of models.
        """
        fits = {name: m.num_models in (None, num_models) for name, m in METHODS.items()}
        if self.methods is None:
            return tuple(name for name in METHODS if fits[name])
        for name in self.methods:
            if not fits[name]:
                raise UserError(
                    f"merge.methods has {name}, which merges {METHODS[name].num_models} models, "
                    f"but there are {num_models}; remove it"
                )
        return self.methods

    def list_weights(self, names: Sequence[str]) -> list[float]:
        """List the weights of models, by the names of the sources that they were fused with.

        Raises:
            UserError: All of them are 0.
        """
        weights = [self.weights.get(name, 1.0) for name in names]
        if not any(weights):
            raise UserError(
                f"merge.weights gives each of {', '.join(names)} the weight 0; give one a weight "
                "above 0"
            )
        return weights

    def dump_method(self, method: str) -> dict[str, Any]:
        """Dump a method and the settings that it reads, as plain JSON values for fingerprints."""
        values = self.model_dump(mode="json")
        return {"method": method} | {name: values[name] for name in METHODS[method].settings}
