"""The Recipe: all settings of one run."""

from typing import Annotated, Any, Literal, cast

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
    model_validator,
)

from rayfuse.config.align import METHODS, AlignSettings
from rayfuse.config.base import Settings, result_neutral
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.corpus import CorpusSettings
from rayfuse.config.evaluate import EvaluateSettings
from rayfuse.config.fuse import FuseSettings
from rayfuse.config.merge import MergeSettings
from rayfuse.config.models import (
    BACKENDS,
    OTHER_THAN_BFLOAT16,
    QUANTISED_DTYPES,
    ModelSettings,
    SourceSettings,
)
from rayfuse.config.overrides import shorten
from rayfuse.config.plan import PlanSettings
from rayfuse.config.train import TrainSettings

PAPER: dict[tuple[str, str], Any] = {
    ("capture", "signal"): "top_k",
    ("capture", "top_k"): 10,
    ("align", "method"): "min_edit_distance",
    ("fuse", "method"): "min_ce",
    ("fuse", "unit"): "row",
    ("fuse", "cost"): "nats_per_token",
    ("fuse", "tail"): "renormalise",
    ("train", "lambda"): 0.9,
    ("train", "divergence"): "forward_kl",
    ("train", "temperature"): 1.0,
    ("train", "epochs"): 1,
    ("train", "publish"): "last",
}
"""What `fusion: paper` sets: FuseLLM, arXiv 2401.10491, section 4.1. The optimizer's settings have
the paper's values by default, and another model may need others."""


class Recipe(Settings):
    """All settings of a run."""

    storage: str
    """The folder or `s3://` prefix under which all data of the run is stored."""
    storage_retry_seconds: PositiveFloat = result_neutral(300.0)
    """Seconds for which a failing request to object storage is retried before the run stops."""
    seed: NonNegativeInt = 0
    """The seed of the order in which rows are trained on."""
    corpus: CorpusSettings
    target: ModelSettings
    sources: Annotated[tuple[SourceSettings, ...], Field(min_length=1)]
    capture: CaptureSettings = CaptureSettings()
    align: AlignSettings = AlignSettings()
    fuse: FuseSettings = FuseSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    merge: MergeSettings = result_neutral(MergeSettings())
    plan: PlanSettings = result_neutral(PlanSettings())
    fusion: Literal["default", "paper"] = "default"
    """`paper` sets the values of FuseLLM's experiments: capture.signal top_k with top_k 10,
    align.method min_edit_distance, fuse.cost nats_per_token, fuse.tail renormalise, train.lambda
    0.9, train.divergence forward_kl at temperature 1, one choice per row, one epoch, the last
    weights. The optimizer's settings are left to the recipe."""

    @property
    def run_sources(self) -> tuple[SourceSettings, ...]:
        """The sources whose models are run; the others are imported."""
        return tuple(source for source in self.sources if source.captured_from is None)

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(cast(dict[str, Any], values))
        if filled.get("fusion") != "paper":
            return filled
        for (section, key), value in PAPER.items():
            given = filled.get(section, {})
            if not isinstance(given, dict):
                continue  # pydantic reports the wrong type later
            part = cast(dict[str, Any], given)
            if part.get(key, value) != value:
                raise ValueError(
                    f"fusion paper sets {section}.{key} to {value!r}, but the recipe sets "
                    f"it to {part[key]!r}; remove one of the two"
                )
            filled[section] = part | {key: value}
        return filled

    @model_validator(mode="after")
    def _check_weights(self) -> "Recipe":
        names = [source.name for source in self.sources]
        for section, weights in (("fuse", self.fuse.weights), ("merge", self.merge.weights)):
            for name in weights:
                if name not in names:
                    raise ValueError(
                        f"{section}.weights names {shorten(name)}, which is no source; "
                        f"sources: {', '.join(names)}"
                    )
        return self

    @model_validator(mode="after")
    def _check_backends(self) -> "Recipe":
        for source in self.sources:
            if self.capture.num_draws and not BACKENDS[source.backend].makes_draws:
                raise ValueError(
                    f"source {source.name} has backend {source.backend}, which makes no draws, but "
                    f"capture.signal is {self.capture.signal}; use backend transformers, or signal "
                    "top_k"
                )
        return self

    @model_validator(mode="after")
    def _check_imports(self) -> "Recipe":
        for source in self.sources:
            if source.captured_from is not None and not self.capture.kept_entries:
                raise ValueError(
                    f"source {source.name} is imported, and stores of other tools have no draws, "
                    f"but capture.signal is {self.capture.signal}; use signal top_k"
                )
        return self

    @model_validator(mode="after")
    def _check_posterior(self) -> "Recipe":
        method = self.align.method
        if self.fuse.uses_posterior and not METHODS[method].has_signal_at_boundaries:
            fitting = [name for name, facts in METHODS.items() if facts.has_signal_at_boundaries]
            raise ValueError(
                f"fuse.method is {self.fuse.method}, which weighs sources by the tokens that have "
                f"ended, but align.method {method} does not record where they end; use "
                f"align.method {' or '.join(fitting)}, or fuse.method avg_ce"
            )
        return self

    @model_validator(mode="after")
    def _check_inside(self) -> "Recipe":
        if self.align.inside_tokens and not self.capture.kept_entries:
            raise ValueError(
                "align.inside_tokens is true, which needs the likeliest tokens, but capture.signal "
                f"{self.capture.signal} stores random draws alone; use signal top_k or "
                "top_k_and_sampled_tail, or inside_tokens false"
            )
        return self

    @model_validator(mode="after")
    def _check_chat(self) -> "Recipe":
        held_out, is_chat = self.evaluate.documents, self.corpus.is_chat
        if held_out is not None and (held_out[0].messages is not None) != is_chat:
            kinds = ("conversations (messages)", "plain text")
            own, other = kinds if is_chat else kinds[::-1]
            raise ValueError(
                f"corpus.documents are {own}, but evaluate.documents are {other}; hold out "
                "documents of the same kind"
            )
        stored = [source.name for source in self.sources if source.captured_from is not None]
        if is_chat and stored:
            raise ValueError(
                f"source {stored[0]} has captured_from, a store of plain texts, but the documents "
                "are conversations; run its model instead, or use the store's own texts"
            )
        return self

    @model_validator(mode="after")
    def _check_bfloat16(self) -> "Recipe":
        places: list[tuple[str, str | None, ModelSettings]] = [
            (f"sources.{model.name}", model.accelerator_type, model) for model in self.sources
        ]
        places.append(("train", self.train.accelerator_type, self.target))
        for place, name, model in places:
            kind = self.plan.gpus.get(name or "")
            if kind is None or kind.has_bfloat16 or model.dtype in OTHER_THAN_BFLOAT16:
                continue
            reason = {"auto": "the default of models on GPUs", "bfloat16": "its dtype"}.get(
                model.dtype, f"as models of dtype {model.dtype} do"
            )
            remedy = f"{place}.dtype=float16" if place != "train" else "target.dtype=float32"
            raise ValueError(
                f"{place}.accelerator_type is {name}, which does not compute in bfloat16, "
                f"{reason}; set {remedy}, or another accelerator_type"
            )
        return self

    @model_validator(mode="after")
    def _check_sequence(self) -> "Recipe":
        tokens = self.train.sequence_tokens
        if tokens is not None and tokens < self.corpus.max_tokens:
            raise ValueError(
                f"train.sequence_tokens {tokens} is below corpus.max_tokens "
                f"{self.corpus.max_tokens}: a row would not fit a sequence; raise it"
            )
        return self

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: ModelSettings) -> ModelSettings:
        if target.dtype == "float16":
            raise ValueError(
                "dtype is float16, whose gradients overflow without loss scaling; use bfloat16 or "
                "float32"
            )
        if target.dtype in QUANTISED_DTYPES:
            raise ValueError(
                f"dtype is {target.dtype}, in which nothing can be trained; use bfloat16 or float32"
            )
        return target

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, storage: str) -> str:
        if not storage.strip():
            raise ValueError("is empty; give a folder, or s3://BUCKET/PREFIX")
        if storage.startswith("memory://"):
            raise ValueError(
                "each process has its own memory; give a folder, or s3://BUCKET/PREFIX"
            )
        return storage

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, sources: tuple[SourceSettings, ...]) -> tuple[SourceSettings, ...]:
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources have the name {twice[0]!r}; give each its own name")
        return sources


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """Dump the resolved recipe, defaults included, as plain values that `parse_recipe` reads back.

    The sections `plan` and `merge` are excluded, as they do not affect what a run computes.
    """
    return recipe.model_dump(mode="json", by_alias=True, exclude={"plan", "merge"})
