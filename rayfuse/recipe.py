"""The Recipe: what a run is, read from a YAML file; its parts are frozen models."""

import copy
import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from rayfuse.overrides import RecipeError, apply_override, parse_yaml, shorten
from rayfuse.plan.settings import PlanSettings
from rayfuse.settings import Settings, Share
from rayfuse.train.settings import TrainSettings

DType = Literal["auto", "float32", "bfloat16", "float16"]

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TASK_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
RESERVED_NAMES = ("target", "clm", "fused", "ensemble", "merged", "all")


class DocumentsSettings(Settings):
    """Where documents lie and how they are read."""

    path: str
    """A file, a folder, a pattern such as `s3://bucket/*.parquet`, or a data set of the hub."""
    format: Literal["auto", "jsonl", "parquet", "text", "dataset"] = "auto"
    """By the file's name, or said: `dataset` is a Hugging Face data set, a folder or a hub id."""
    text: str = "text"
    """The field or column that holds the text."""
    domain: str | None = None
    """The domain of all these documents; without it, each document's own field `domain`."""
    split: str = "train"
    """The split of a Hugging Face data set."""


def _list_documents(value: object) -> object:
    """Let `documents: PATH` and `documents: [PATH, {path: PATH, ...}]` be written short."""
    items = cast(list[object], value) if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Documents = Annotated[
    tuple[DocumentsSettings, ...],
    BeforeValidator(_list_documents, json_schema_input_type=Any),
    Field(min_length=1),
]


class CorpusSettings(Settings):
    """How documents become rows that fit every tokenizer of the recipe."""

    documents: Documents
    """The text to learn from."""
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    """Tokens in a row at most, counted by every tokenizer of the recipe, specials included."""
    shard_tokens: PositiveInt = 1_000_000
    """About how many tokens go into one shard, counted as four bytes of text each."""
    max_document_bytes: PositiveInt = 50_000_000
    """Documents longer than this are rejected: a dump that lost its line ends, most likely."""
    recut: bool = False
    """Cut the documents for the tokenizers of this recipe even where they are cut already, for
    another. By default they stay as they were first captured: a source or target that comes later
    may then need more than max_tokens for a row, and what is captured keeps its use."""


class ModelSettings(Settings):
    """One LLM: a local folder or a hub id."""

    model: str
    """A folder that `AutoModelForCausalLM.from_pretrained` loads, or a hub id."""
    revision: str | None = None
    """The hub commit; write it down for a run that can be repeated."""
    dtype: DType = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU; a capture stays in what it was begun in."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class SourceSettings(ModelSettings):
    """One source LLM and the machines it runs on."""

    name: str
    """What the source is called in folders and tables."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs the model. `vllm`, an extra of its own, spreads a model over all GPUs of an actor;
    it gives the likeliest tokens only, no draws."""
    gpus: NonNegativeFloat | None = None
    """GPUs of one actor, fractions allowed; by default 1 where a kind is named or the cluster has
    or may get any, else 0."""
    accelerator_type: str | None = None
    """The kind of GPU, as Ray names it: `L4`, `A10G`, `H100`, ..."""
    cpus: PositiveFloat = 1.0
    """CPUs of one actor."""
    min_actors: PositiveInt = 1
    """Actors that are started at once."""
    max_actors: PositiveInt | None = None
    """Actors that the cluster may grow to; by default the source's share of what the cluster has,
    such that all sources finish together."""
    batch_tokens: PositiveInt | None = None
    """Tokens in one forward pass of this source, instead of capture.batch_tokens."""
    dollars_per_hour: NonNegativeFloat | None = None
    """What one actor's share of its machine costs; the money spent and left is then shown."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError("use letters, digits, '.', '_' and '-', a letter or digit first")
        if name in RESERVED_NAMES:
            raise ValueError(f"{', '.join(RESERVED_NAMES)} are names rayfuse uses itself")
        return name

    @model_validator(mode="after")
    def _check_actors(self) -> "SourceSettings":
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(
                f"max_actors {self.max_actors} is below min_actors {self.min_actors}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _check_gpus(self) -> "SourceSettings":
        gpus = self.gpus or 0.0
        if gpus > 1 and (self.backend != "vllm" or gpus != int(gpus)):
            raise ValueError(
                f"gpus is {self.gpus}; backend transformers uses one GPU or a part of it, backend "
                "vllm any whole number of them"
            )
        return self


MOST_ENTRIES = 255
"""At a position: what alignment has ranks for."""


class CaptureSettings(Settings):
    """How each source LLM is run over the corpus."""

    signal: Literal["top_k", "sampled", "top_k_and_sampled_tail"] = "top_k"
    """What is kept of each distribution. `top_k`: the likeliest tokens and the mass outside them.
    `sampled`: random draws from all of it. `top_k_and_sampled_tail`: the likeliest tokens, and
    draws from the rest. Draws are right on average, whatever the target thinks of the tail."""
    top_k: Annotated[int, Field(ge=1, le=MOST_ENTRIES)] = 16
    """Log-probabilities kept per position, 255 at most; the rest becomes one tail mass."""
    draws: Annotated[int, Field(ge=1, le=128)] = 12
    """Draws per position, where the signal has any."""
    batch_tokens: PositiveInt = 16_384
    """Tokens in one forward pass, padding counted; raise it until the GPU's memory is used."""
    chunk_positions: PositiveInt = 1024
    """Positions that the head is applied to at a time: they alone exist as full logits."""
    max_rejected_share: Share = 0.01
    """Rows that may be rejected, of a source's rows, before the run stops."""

    @model_validator(mode="after")
    def _check_entries(self) -> "CaptureSettings":
        if self.kept_entries + self.num_draws > MOST_ENTRIES:
            raise ValueError(
                f"top_k {self.top_k} and draws {self.draws} are more than {MOST_ENTRIES} entries "
                "of a position; lower one of them"
            )
        return self

    @property
    def kept_entries(self) -> int:
        """The likeliest tokens kept at each position."""
        return 0 if self.signal == "sampled" else self.top_k

    @property
    def num_draws(self) -> int:
        """The draws made at each position."""
        return 0 if self.signal == "top_k" else self.draws


class AlignSettings(Settings):
    """How a source's tokens become the target's."""

    method: Literal["bytes", "exact", "mined", "statistics"] = "bytes"
    """`bytes`: positions that start at the same byte, entries that spell the same bytes, or begin
    with them. `exact`: one source token for one target token, of the same bytes; the rest is tail.
    `mined`: FuseLLM's minimum edit distance. `statistics`: FuseChat's, the target token that the
    corpus shows most often."""


class FuseSettings(Settings):
    """How several aligned sources become one distribution."""

    method: Literal["min_ce", "avg_ce"] = "min_ce"
    """`min_ce`: the source with the lowest cross-entropy; `avg_ce`: a mean weighted by it."""
    unit: Literal["row", "document", "span", "token"] = "row"
    """The text that one choice is made for: a row, all rows of a document that no source rejected,
    a window of `span_tokens` target tokens around each position, or each token by itself."""
    span_tokens: PositiveInt = 32
    """Width of the window of the unit `span`: half of it to each side of the position's own token,
    cut off at the row's ends."""
    cost: Literal["nats_per_byte", "nats_per_token"] = "nats_per_byte"
    """What sources are compared by. Per token, as the papers do, favours the finer tokenizer."""
    temperature: PositiveFloat = 1.0
    """Of the `avg_ce` weights, softmax(-cost / temperature)."""
    weights: dict[str, NonNegativeFloat] = Field(default_factory=dict[str, NonNegativeFloat])
    """By source: its share of `avg_ce` is multiplied by it; 0 leaves the source out. Default 1."""
    skip_noise: bool = True
    """Leave out a source that predicts no row better than chance, ln V nats a token: its weights or
    its tokenizer are not what they should be."""
    tail: Literal["bucket", "truth", "renormalise"] = "bucket"
    """`bucket`: the mass outside the top k is one more outcome. `truth`: it goes to the token that
    really comes next. `renormalise`: it is left out and the top k scaled up to 1, as the papers
    do."""

    @model_validator(mode="after")
    def _check_cost(self) -> "FuseSettings":
        if self.cost == "nats_per_token" and self.unit in ("span", "token"):
            raise ValueError(
                f"cost nats_per_token cannot be told for unit {self.unit}, where sources have no "
                "whole tokens; use unit row or document, or cost nats_per_byte"
            )
        return self


class TasksSettings(Settings):
    """What models are asked besides held-out text, by lm-eval (`pip install rayfuse[tasks]`)."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tasks, groups of tasks or tags: those of `folder`, or lm-eval's own, which come from the hub.
    A group is one score, the mean of its tasks'."""
    folder: str | None = None
    """A folder of task definitions, lm-eval's YAML and the Python beside it, which is run."""
    data: str | None = None
    """What the definitions of `folder` are given as `data`: the folder that their sets lie in."""
    num_fewshot: NonNegativeInt | None = None
    """Examples before each question; by default as many as each definition says."""
    limit: PositiveInt | None = None
    """Questions of each task at most, the first ones; by default all."""

    @field_validator("names")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not TASK_PATTERN.fullmatch(name):
                raise ValueError(
                    f"{shorten(name)} is no task's name; give a folder as tasks.folder"
                )
            if names.count(name) > 1:
                raise ValueError(f"the task {name!r} is there twice")
        return names


class EvaluateSettings(Settings):
    """The held-out text and how models are scored on it."""

    documents: Documents | None = None
    """Text that no model here was trained on; by default a share of the corpus is kept back."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the corpus' documents that is kept back where `documents` is not given."""
    batch_tokens: PositiveInt = 16_384
    """Tokens in one forward pass."""
    bootstrap_samples: PositiveInt = 2000
    """Resamples of the documents for the confidence intervals."""
    tasks: TasksSettings | None = None
    """Tasks for lm-eval; by default none."""
    run_generated_code: bool = False
    """Let tasks run the code that models write (HumanEval, MultiPL-E), in a sandbox."""


PAPER: dict[tuple[str, str], Any] = {
    ("capture", "top_k"): 10,
    ("align", "method"): "mined",
    ("fuse", "method"): "min_ce",
    ("fuse", "unit"): "row",
    ("fuse", "cost"): "nats_per_token",
    ("fuse", "tail"): "renormalise",
    ("train", "lambda"): 0.9,
}
"""What `fusion: paper` sets: FuseLLM, arXiv 2401.10491, section 4.1."""


class Recipe(Settings):
    """A whole run."""

    storage: str
    """The folder or `s3://` prefix that everything is kept under."""
    storage_patience_seconds: PositiveFloat = 300.0
    """How long a request to object storage may fail again and again before the run stops."""
    seed: NonNegativeInt = 0
    """Of the order in which rows are trained on."""
    corpus: CorpusSettings
    target: ModelSettings
    sources: Annotated[tuple[SourceSettings, ...], Field(min_length=1)]
    capture: CaptureSettings = CaptureSettings()
    align: AlignSettings = AlignSettings()
    fuse: FuseSettings = FuseSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    plan: PlanSettings = PlanSettings()
    fusion: Literal["default", "paper"] = "default"
    """`paper` sets what FuseLLM's own experiments had: capture.top_k 10, align.method mined,
    fuse.cost nats_per_token, fuse.tail renormalise, train.lambda 0.9, one choice per row."""

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
                continue  # wrong anyway, and said so where it is checked
            part = cast(dict[str, Any], given)
            if part.get(key, value) != value:
                raise ValueError(
                    f"fusion paper sets {section}.{key} to {value!r}, but the recipe says "
                    f"{part[key]!r}; remove one of the two"
                )
            filled[section] = part | {key: value}
        return filled

    @model_validator(mode="after")
    def _check_weights(self) -> "Recipe":
        names = [source.name for source in self.sources]
        for name in self.fuse.weights:
            if name not in names:
                raise ValueError(
                    f"fuse.weights names {name!r}, which is no source; sources: {', '.join(names)}"
                )
        return self

    @model_validator(mode="after")
    def _check_backends(self) -> "Recipe":
        for source in self.sources:
            if source.backend == "vllm" and self.capture.num_draws:
                raise ValueError(
                    f"source {source.name} has backend vllm, which makes no draws, but "
                    f"capture.signal is {self.capture.signal}; use backend transformers, or signal "
                    "top_k"
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

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, sources: tuple[SourceSettings, ...]) -> tuple[SourceSettings, ...]:
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}; give each its own name")
        return sources


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Return the recipe of a YAML file, with `section.key=value` overrides applied.

    Raises:
        RecipeError: The file cannot be read, or a setting is unknown or wrong; every fault is
            listed, with the setting, its value and the remedy.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    values = parse_yaml(text, f"the recipe {path}")
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path} holds no settings; begin with `storage: FOLDER`")
    return read_values(cast(dict[str, Any], values), overrides or [])


def read_values(values: dict[str, Any], overrides: list[str]) -> Recipe:
    """Return the recipe of plain values, with `section.key=value` overrides applied.

    Raises:
        RecipeError: As for `read_recipe`.
    """
    changed = copy.deepcopy(values)
    for override in overrides:
        apply_override(changed, override)
    return parse_recipe(changed)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Return the recipe of plain values.

    Raises:
        RecipeError: As for `read_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(cast(dict[str, Any], fault)) for fault in error.errors()]
        raise RecipeError("\n".join(lines)) from error


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the full, resolved recipe as plain values that `parse_recipe` reads back.

    Without its section `plan`, which changes nothing of what is computed.
    """
    return recipe.model_dump(mode="json", by_alias=True, exclude={"plan"})


def _explain(fault: dict[str, Any]) -> str:
    """Say one of pydantic's faults as setting, value and remedy."""
    setting = ".".join(str(part) for part in fault["loc"]) or "the recipe"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{setting} is no setting of rayfuse; {remedy}"
    if fault["type"] == "missing":
        return f"{setting} is missing; it has no default, so the recipe must set it"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{setting} is {shorten(fault['input'])}: {message[0].lower()}{message[1:]}"


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    """List the keys that the settings at a location have, aliases for names."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part in fields:  # else it is the key of a dictionary
            model = _settings_within(fields[part].annotation)
    return [field.alias or name for name, field in model.model_fields.items()]


def _settings_within(annotation: Any) -> Any:
    """Find the Settings class inside a tuple, a union or an Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    found = (_settings_within(inner) for inner in get_args(annotation))
    return next((model for model in found if model), None)


if __name__ == "__main__":
    print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))
