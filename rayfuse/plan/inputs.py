"""The inputs of a plan: sizes of models and text, from their files or from the recipe."""

import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import pyarrow as pa
import yaml

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.capture.actor_memory import estimate_actor_memory
from rayfuse.config.base import UserError, first_line
from rayfuse.config.corpus import Documents
from rayfuse.config.load import read_values
from rayfuse.config.models import ModelSettings
from rayfuse.config.overrides import RecipeError
from rayfuse.config.plan import PlanSettings
from rayfuse.config.recipe import Recipe
from rayfuse.corpus.documents import Document, read_documents
from rayfuse.corpus.shards import BYTES_PER_TOKEN, build_chat_rows, build_rows, group_inputs
from rayfuse.corpus.split import find_fault
from rayfuse.models.chat import ChatTokens, load_chat_format
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.host_memory import GIB
from rayfuse.pipeline import is_stage_done
from rayfuse.plan.advantage import measure_advantage
from rayfuse.plan.model_size import ModelSize, size_from_files, size_from_settings
from rayfuse.run.failed_sources import describe_failed, read_failures
from rayfuse.run.inputs import InputFile, list_documents
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.status import list_data_sets
from rayfuse.storage.chat_columns import has_answers, read_messages
from rayfuse.storage.manifest import Manifest

TARGET = "target"

MAX_RETRY_SECONDS = 10.0
"""A plan needs no storage, so it retries requests for no longer than this."""

SAMPLE_FILES, SAMPLE_DOCUMENTS, SAMPLE_BYTES = 4, 32, 100_000
"""Size of the sample in which tokens are counted: files, and documents or bytes of each."""

EXAMPLES = importlib.resources.files("rayfuse.plan") / "examples"
"""Recipes that are planned without reading any other file."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class PlannedModel:
    """A model of the recipe and its token length on the text."""

    name: str
    size: ModelSize
    bytes_per_token: float


@dataclass(frozen=True)
class TextSize:
    """The size of a corpus."""

    num_bytes: float
    shards: int
    file_groups: int
    """Groups of files that are read together; each makes at least one shard."""


@dataclass
class PlanInputs:
    """Everything that a plan is computed from."""

    recipe: Recipe
    target: PlannedModel
    sources: tuple[PlannedModel, ...]
    corpus: TextSize
    held_out: TextSize
    row_bytes: float
    """Text in a row, on average."""
    notes: list[str] = field(default_factory=list[str])
    """Where the figures come from, a sentence per figure."""
    warnings: list[str] = field(default_factory=list[str])
    done: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """By stage and name: committed shards of a data set, and 1 for a training or an evaluation that
    is complete."""
    layout: Layout | None = None
    """None where it cannot be planned, or for an example."""
    sample: pa.Table | None = None
    """Rows of the first documents."""
    advantage: float | None = None
    """Share by which the best source's NLL of the corpus is below the target's, where it is known:
    see `measure_advantage`."""

    def row_tokens(self, model: PlannedModel) -> float:
        """Compute a row's mean length in a model's tokens."""
        return self.row_bytes / model.bytes_per_token


def list_examples() -> list[str]:
    """List the names of the examples."""
    return sorted(file.name.removesuffix(".yaml") for file in EXAMPLES.iterdir())


def read_example(name: str, overrides: list[str]) -> Recipe:
    """Read the recipe of an example, with `section.key=value` overrides applied.

    Raises:
        RecipeError: There is no such example, or a setting is unknown or wrong.
    """
    if name not in list_examples():
        raise RecipeError(f"there is no example {name!r}; use {', '.join(list_examples())}")
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    return read_values(yaml.safe_load(text), overrides)


def read_inputs(recipe: Recipe, *, is_example: bool = False) -> PlanInputs:
    """Collect the inputs of a plan; files that cannot be read become warnings.

    Args:
        recipe: The recipe.
        is_example: Read no files: everything is in the recipe's section `plan`.

    Raises:
        UserError: The size of a model or of the corpus is unknown; the message names the setting
            that gives it.
    """
    warnings: list[str] = []
    layout, files, held_out_files, sample = None, None, None, None
    if not is_example:
        retry_seconds = min(recipe.storage_retry_seconds, MAX_RETRY_SECONDS)
        hasty = recipe.model_copy(update={"storage_retry_seconds": retry_seconds})
        layout = _try(
            lambda: plan_layout(hasty, ALIGN_FACTS), warnings, "completed work is unknown"
        )
        files = _try(
            lambda: _list_all(recipe.corpus.documents, "corpus.documents"), warnings, "documents"
        )
        own = recipe.evaluate.documents
        if own is not None:
            held_out_files = _try(
                lambda: _list_all(own, "evaluate.documents"), warnings, "held-out documents"
            )
        if files:
            found = files
            sample = _try(lambda: sample_rows(recipe, found), warnings, "tokens are not counted")
    notes: list[str] = []
    models = [
        _measure_model(recipe, name, settings, sample, notes)
        for name, settings in [(TARGET, recipe.target), *((s.name, s) for s in recipe.run_sources)]
    ]
    if not is_example:
        _try(partial(_note_memory, recipe, notes), warnings, "host memory")
    corpus, held_out = _measure_text(recipe, models[0], files, held_out_files, notes)
    inputs = PlanInputs(
        recipe=recipe,
        target=models[0],
        sources=tuple(models[1:]),
        corpus=corpus,
        held_out=held_out,
        row_bytes=_measure_rows(recipe, models[0], sample),
        notes=notes,
        warnings=list(dict.fromkeys(warnings)),
        layout=layout,
        sample=sample,
    )
    if layout is not None:
        _look_up_progress(inputs, layout)
        failed = read_failures(recipe, layout)
        inputs.warnings += [f"{text} The plan has it." for text in describe_failed(failed)]
        measure = partial(measure_advantage, recipe, layout)
        inputs.advantage = _try(measure, inputs.warnings, "captured sources")
    return inputs


def _try(read: Callable[[], Result], warnings: list[str], subject: str) -> Result | None:
    """Read a file, or append a warning with the reason why it cannot be read."""
    try:
        return read()
    except Exception as error:  # the clients of object stores and of the hub share no error class
        reason = first_line(error)
        warnings.append(f"{subject}: {reason}")
        return None


def _list_all(documents: Documents, setting: str) -> list[InputFile]:
    return [file for found in list_documents(documents, setting) for file in found.files]


def sample_documents(
    files: Sequence[InputFile], max_document_bytes: int
) -> Iterator[tuple[InputFile, list[Document]]]:
    """Yield the first valid documents of a few evenly spaced files.

    Data sets of the hub are skipped: reading one downloads all of it.
    """
    at_hand = [file for file in files if file.num_bytes or file.format != "dataset"]
    step = max(1, len(at_hand) // SAMPLE_FILES)
    for file in at_hand[::step][:SAMPLE_FILES]:
        documents: list[Document] = []
        num_bytes = 0
        for document in islice(read_documents(file, max_document_bytes), SAMPLE_DOCUMENTS):
            if find_fault(document, max_document_bytes) is None:
                documents.append(document)
                num_bytes += len(document.full_text.encode())
            if num_bytes > SAMPLE_BYTES:
                break
        yield file, documents


def sample_rows(recipe: Recipe, files: Sequence[InputFile]) -> pa.Table | None:
    """Build rows from the first documents of a few files; None if they hold no text.

    Raises:
        ValueError: A tokenizer or a file cannot be read.
    """
    parts = sample_documents(files, recipe.corpus.max_document_bytes)
    documents = [document for _, part in parts for document in part]
    if not documents:
        return None
    models, most = (recipe.target, *recipe.sources), recipe.corpus.max_tokens
    if recipe.corpus.is_chat:
        formats = [load_chat_format(model) for model in models]
        return build_chat_rows(documents, formats[0], formats, max_tokens=most)[0]
    tokenizers = [load_recipe_tokenizer(model) for model in models]
    return build_rows(documents, tokenizers[0], tokenizers, max_tokens=most)


def _measure_model(
    recipe: Recipe,
    name: str,
    settings: ModelSettings,
    sample: pa.Table | None,
    notes: list[str],
) -> PlannedModel:
    given = recipe.plan.models.get(name)
    if given is None:
        try:
            size = size_from_files(settings)
        except ValueError as error:
            raise UserError(
                f"{name}: {error}; or set its size: plan.models.{name}.parameters=7e9"
            ) from error
        notes.append(f"{name}: {size.parameters:,.0f} weights, from its config.json")
    else:
        size = size_from_settings(given)
        notes.append(f"{name}: {size.parameters:,.0f} weights, from plan.models.{name}")
    own = None if given is None else given.bytes_per_token
    if sample is None or not sample.num_rows or own is not None:
        return PlannedModel(name, size, own or recipe.plan.bytes_per_token)
    num_tokens, num_bytes = _count_tokens(settings, sample), _count_bytes(sample)
    bytes_per_token = num_bytes / max(num_tokens, 1)
    notes.append(f"{name}: {bytes_per_token:.2f} bytes per token, counted in {num_bytes:,} bytes")
    return PlannedModel(name, size, bytes_per_token)


def _count_tokens(settings: ModelSettings, rows: pa.Table) -> int:
    """Count a model's tokens in rows; in conversations also those of the template and the user."""
    if has_answers(rows):
        encoded = load_chat_format(settings).encode(read_messages(rows))
        return sum(len(row.ids) for row in encoded if isinstance(row, ChatTokens))
    texts, ends = rows["text"].to_pylist(), rows["ends_document"].to_pylist()
    return sum(map(len, load_recipe_tokenizer(settings).encode_rows(texts, ends)))


def _count_bytes(rows: pa.Table) -> int:
    """Count the bytes of rows; in conversations of all messages, as files hold all of them."""
    if has_answers(rows):
        talks = read_messages(rows)
        return sum(len(message.text.encode()) for talk in talks for message in talk)
    return sum(rows["num_bytes"].to_pylist())


def _note_memory(recipe: Recipe, notes: list[str]) -> None:
    """Note the host memory that an actor of each source requests from Ray."""
    estimate = partial(estimate_actor_memory, shard_tokens=recipe.corpus.shard_tokens)
    for source in recipe.run_sources:
        if source.name in recipe.plan.models:
            continue  # its files may be elsewhere
        on_cpu, on_gpu = (
            estimate(source, recipe.capture, on_gpu=gpu) / GIB for gpu in (False, True)
        )
        notes.append(
            f"{source.name}: an actor reserves at most {on_cpu:.1f} GiB of host memory on a CPU, "
            f"{on_gpu:.1f} with a GPU (sources.{source.name}.memory_gib)"
        )


def _measure_rows(recipe: Recipe, target: PlannedModel, sample: pa.Table | None) -> float:
    if recipe.plan.row_tokens is not None or sample is None or not sample.num_rows:
        return (recipe.plan.row_tokens or recipe.corpus.max_tokens) * target.bytes_per_token
    return _count_bytes(sample) / sample.num_rows


def _measure_text(
    recipe: Recipe,
    target: PlannedModel,
    files: list[InputFile] | None,
    held_out_files: list[InputFile] | None,
    notes: list[str],
) -> tuple[TextSize, TextSize]:
    plan = recipe.plan
    has_own = recipe.evaluate.documents is not None
    share = 0.0 if has_own else recipe.evaluate.held_out_share
    if plan.tokens is not None:
        total = _divide_text(recipe, plan.tokens * target.bytes_per_token / (1 - share))
        notes.append(f"corpus: {plan.tokens:,.0f} tokens, from plan.tokens")
    elif files and all(file.num_bytes for file in files):
        total = _size_files(recipe, files)
        notes.append(
            f"corpus: {total.num_bytes:,.0f} bytes of text, from the sizes of {len(files)} files"
        )
    else:
        raise UserError(
            "cannot infer the size of the corpus from corpus.documents; set plan.tokens, "
            "e.g. plan.tokens=1.8e9"
        )
    if has_own:
        empty = TextSize(0.0, 0, 0)
        return total, _size_files(recipe, held_out_files) if held_out_files else empty
    return _take_share(recipe, total, 1 - share), _take_share(recipe, total, share)


def _shard_bytes(recipe: Recipe) -> int:
    return recipe.corpus.shard_tokens * BYTES_PER_TOKEN


def _divide_text(recipe: Recipe, num_bytes: float) -> TextSize:
    """Divide a text without known files into shards."""
    shards = max(1, -(-num_bytes // _shard_bytes(recipe)))
    return TextSize(num_bytes, int(shards), 1)


def _size_files(recipe: Recipe, files: Sequence[InputFile]) -> TextSize:
    """Estimate the text in files; every group of them makes at least one shard."""
    groups = group_inputs(files, _shard_bytes(recipe))
    sizes = [sum(_text_bytes(file, recipe.plan) for file in group) for group in groups]
    shards = sum(max(1, -(-size // _shard_bytes(recipe))) for size in sizes)
    return TextSize(float(sum(sizes)), int(shards), len(groups))


def _text_bytes(file: InputFile, plan: PlanSettings) -> float:
    return file.num_bytes * (plan.unpacked_ratio if file.is_packed else 1.0)


def _take_share(recipe: Recipe, text: TextSize, share: float) -> TextSize:
    """Take a share of a text's documents; every group of files still makes a shard."""
    num_bytes = text.num_bytes * share
    shards = max(text.file_groups, -(-num_bytes // _shard_bytes(recipe)))
    return TextSize(num_bytes, int(shards), text.file_groups)


def _look_up_progress(inputs: PlanInputs, layout: Layout) -> None:
    """Replace estimates by the exact numbers of rows that are stored, and count complete shards."""
    for part in list_data_sets(layout):
        manifest = part.data.read_manifest()
        inputs.done[part.stage, part.data.name] = (
            len(part.data.list_committed(inputs.corpus.shards))
            if manifest is None
            else manifest.num_shards
        )
    for run in layout.runs:
        inputs.done["train", run.name] = int("done.json" in layout.store.sizes(run.folder))
    inputs.done["evaluate", ""] = int(is_stage_done("evaluate", layout))
    for name, data in (("corpus", layout.corpus), ("held_out", layout.held_out)):
        manifest = data.read_manifest()
        if manifest is None or not manifest.rows:
            continue
        num_bytes = sum(commit.stats["bytes"] for commit in data.commits().values())
        if inputs.recipe.plan.tokens is None:
            text = replace(getattr(inputs, name), num_bytes=num_bytes, shards=manifest.num_shards)
            setattr(inputs, name, text)
        if name == "corpus":
            inputs.row_bytes = num_bytes / manifest.rows
            exact = num_bytes / max(manifest.tokens, 1)
            inputs.target = replace(inputs.target, bytes_per_token=exact)
            inputs.notes.append(f"corpus: {manifest.tokens:,} tokens are stored")
    inputs.sources = tuple(
        _count_captured(inputs, model, layout.captured[model.name].read_manifest())
        for model in inputs.sources
    )


def _count_captured(
    inputs: PlanInputs, model: PlannedModel, manifest: Manifest | None
) -> PlannedModel:
    """Replace a source's estimated tokens by those captured, once its capture is complete."""
    if manifest is None or not manifest.tokens:
        return model
    return replace(model, bytes_per_token=inputs.corpus.num_bytes / manifest.tokens)
