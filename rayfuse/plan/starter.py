"""`rayfuse init --target --source`: the template, with what the files of models state filled in."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from rayfuse.config.base import UserError
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import RESERVED_BEGINNINGS, RESERVED_NAMES, ModelSettings
from rayfuse.config.plan import GPU_KINDS, PlanSettings
from rayfuse.config.recipe import Recipe
from rayfuse.config.template import read_template
from rayfuse.config.text import show_on_one_line
from rayfuse.models.files import ModelFiles, read_model_files
from rayfuse.plan.estimate import forward_memory, train_memory
from rayfuse.plan.model_size import ModelSize, size_from_files
from rayfuse.report.licences import Licence, read_licence
from rayfuse.runtime.memory import GIB

GPU = "H100"
"""The GPU type by whose memory the GPUs of an actor are counted."""

GPU_BYTES = GPU_KINDS[GPU]["memory_gib"] * GIB

WORKER_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

MAX_TOKENS = re.compile(r"(?<=  max_tokens: )\d+")
TARGET = re.compile(r"(?<=^target:)(.*?\n  model: )[^\n]*", re.M | re.S)
WORKERS = re.compile(r"(?<=  num_workers: )\d+")
ZERO_STAGE = re.compile(r"# zero_stage: \d")
SOURCES = re.compile(r"(?<=^sources:)([^\n]*\n).*?(?=\n\n)", re.M | re.S)


@dataclass(frozen=True)
class ModelFacts:
    """What a model's files state."""

    model: str
    files: ModelFiles
    size: ModelSize
    licence: Licence

    def describe(self, *, is_source: bool) -> str:
        """Describe the model in a comment."""
        dtype = self.files.config.get("dtype") or self.files.config.get("torch_dtype")
        context = self.files.context_tokens
        parts = [
            f"{_round_count(self.size.parameters)} weights",
            *([str(dtype).removeprefix("torch.")] if dtype else []),
            f"context {context:,}" if context else "no limit of its context",
            f"licence {self.licence.name}" if self.licence.name else self.licence.note,
        ]
        if is_source and self.licence.name:
            parts.append(f"training on its outputs: {self.licence.terms}")
        return show_on_one_line("; ".join(parts))

    def count_gpus(self) -> int:
        """Count the GPUs of type `GPU` that hold the model and a forward pass: a power of two."""
        capture = CaptureSettings()
        needed = forward_memory(
            self.size, capture.batch_tokens, capture.chunk_positions, PlanSettings()
        )
        return 2 ** max(0, math.ceil(math.log2(needed / GPU_BYTES)))


def write_recipe(target: str | None = None, sources: Sequence[str] = ()) -> str:
    """Write a commented recipe to start from, with what the files of models state of them.

    Args:
        target: The model to train, a folder or a hub id; by default the template's.
        sources: The models to learn from; by default the template's.

    Raises:
        UserError: A model cannot be read.
    """
    text = read_template()
    facts = {place: _read_facts(place, name) for place, name in _list_models(target, sources)}
    contexts = [one.files.context_tokens for one in facts.values()]
    longest = min((context for context in contexts if context), default=None)
    if longest is not None and longest < int(_search(MAX_TOKENS, text)):
        text = MAX_TOKENS.sub(str(longest), text)
    if target is not None:
        own = facts["--target"]
        line = f"{_quote(own.model)}  # {own.describe(is_source=False)}"
        text = TARGET.sub(lambda found: found[1] + line, text)
        text = _fill_in_workers(own.size, text)
    if sources:
        names = _choose_names(sources, target)
        blocks = [
            _write_source(name, facts[f"--source {model}"])
            for name, model in zip(names, sources, strict=True)
        ]
        text = SOURCES.sub(lambda found: found[1] + "\n".join(blocks), text)
    return text


def _fill_in_workers(size: ModelSize, text: str) -> str:
    """Fill in the smallest number of workers that hold a training, each with one GPU.

    It is a power of two. Where no number holds all of the weights per worker, ZeRO 3 divides them.
    """
    recipe = Recipe.model_validate(yaml.safe_load(text))
    default = recipe.train.zero_stage
    for stage in (default, 3):
        for workers in WORKER_COUNTS:
            changes = {"num_workers": workers, "zero_stage": stage}
            train = recipe.train.model_copy(update=changes)
            if train_memory(size, recipe.model_copy(update={"train": train})) <= GPU_BYTES:
                text = WORKERS.sub(str(workers), text)
                return text if stage == default else ZERO_STAGE.sub(f"zero_stage: {stage}", text)
    note = f"  # {WORKER_COUNTS[-1]} of one {GPU} each do not hold the target: see train.lora"
    return WORKERS.sub(lambda found: found[0] + note, text)


def _list_models(target: str | None, sources: Sequence[str]) -> list[tuple[str, str]]:
    given = [("--target", target)] if target is not None else []
    return [*given, *((f"--source {model}", model) for model in sources)]


def _read_facts(place: str, model: str) -> ModelFacts:
    settings = ModelSettings(model=model)
    try:
        files, size = read_model_files(settings), size_from_files(settings)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    return ModelFacts(model, files, size, read_licence(settings, is_online=True))


def _search(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    assert found is not None, pattern
    return found[0]


def _choose_names(models: Sequence[str], target: str | None) -> list[str]:
    """Choose the sources' names: the last parts of their paths, or `self` for the target's copy."""
    names: list[str] = []
    for model in models:
        base = re.sub(r"[^a-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2].lower())
        name = "self" if model == target else base.strip("-._") or "source"
        if name in RESERVED_NAMES or name.startswith(RESERVED_BEGINNINGS):
            name = f"source-{name}"
        number = 2
        chosen = name
        while chosen in names:
            chosen, number = f"{name}-{number}", number + 1
        names.append(chosen)
    return names


def _write_source(name: str, facts: ModelFacts) -> str:
    lines = [
        f"  - name: {_quote(name)}  # any name; it becomes part of folder names",
        f"    model: {_quote(facts.model)}  # {facts.describe(is_source=True)}",
        f"    gpus: {facts.count_gpus()}  # per actor; fractions are allowed",
        "    max_actors: 8",
    ]
    return "\n".join(lines)


def _quote(text: str) -> str:
    """Write a text as a YAML value, in quotes where it needs them."""
    return yaml.safe_dump(text, width=math.inf, allow_unicode=True).splitlines()[0]


def _round_count(count: float) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:,.0f}M"
