"""What a plan starts from: sizes of models and text, as far as files tell them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

import pyarrow as pa

from rayfuse.config.corpus import Documents
from rayfuse.config.models import ModelSettings
from rayfuse.config.plan import PlanSettings
from rayfuse.config.recipe import Recipe
from rayfuse.corpus.documents import Document, read_documents
from rayfuse.corpus.shards import BYTES_PER_TOKEN, build_rows, group_inputs
from rayfuse.corpus.split import find_fault
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.pipeline import is_stage_done
from rayfuse.plan.model_size import ModelSize, size_from_files, size_from_settings
from rayfuse.run.inputs import InputFile, list_inputs
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.status import list_data_sets
from rayfuse.storage.manifest import Manifest

TARGET = "target"

RETRY_SECONDS = 10.0
"""How long a plan waits for storage."""

SAMPLE_FILES, SAMPLE_DOCUMENTS, SAMPLE_BYTES = 4, 32, 100_000
"""Documents that tokens are counted in: files, and of each so many documents or bytes."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Model:
    """A model of the recipe and how it sees the text."""

    name: str
    size: ModelSize
    bytes_per_token: float


@dataclass(frozen=True)
class Text:
    """A data set of rows."""

    num_bytes: float
    shards: int
    files: int
    """Groups of files that are read together."""


@dataclass
class Setup:
    """What a plan starts from."""

    recipe: Recipe
    target: Model
    sources: tuple[Model, ...]
    corpus: Text
    held_out: Text
    row_bytes: float
    """Of text in a row, on average."""
    known: list[str] = field(default_factory=list[str])
    """Where the figures come from, a sentence each."""
    warnings: list[str] = field(default_factory=list[str])
    done: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """By stage and name: committed shards of a data set, and 1 for a training or an evaluation that
    is complete."""
    layout: Layout | None = None
    """None where it could not be told, or for an example."""
    sample: pa.Table | None = None
    """Rows cut from the first documents."""

    def row_tokens(self, model: Model) -> float:
        """Return a row's mean length in a model's tokens."""
        return self.row_bytes / model.bytes_per_token


def read_setup(recipe: Recipe, *, is_example: bool = False) -> Setup:
    """Return what a plan starts from; what cannot be read is told in its warnings.

    Args:
        recipe: The recipe.
        is_example: Look at no file: all is in its section `plan`.

    Raises:
        ValueError: Nothing is known of a model's size or of the corpus'; the message names the
            setting that tells it.
    """
    faults: list[str] = []
    layout, inputs, held_out_inputs, sample = None, None, None, None
    if not is_example:
        hasty = min(recipe.storage_retry_seconds, RETRY_SECONDS)
        quick = recipe.model_copy(update={"storage_retry_seconds": hasty})
        layout = _try(lambda: plan_layout(quick), faults, "what is done already is not known")
        inputs = _try(
            lambda: _list_all(recipe.corpus.documents, "corpus.documents"), faults, "documents"
        )
        own = recipe.evaluate.documents
        if own is not None:
            held_out_inputs = _try(
                lambda: _list_all(own, "evaluate.documents"), faults, "held-out documents"
            )
        if inputs:
            files = inputs
            sample = _try(lambda: sample_rows(recipe, files), faults, "tokens are not counted")
    known: list[str] = []
    models = [
        _measure_model(recipe, name, settings, sample, known)
        for name, settings in [(TARGET, recipe.target), *((s.name, s) for s in recipe.sources)]
    ]
    corpus, held_out = _measure_text(recipe, models[0], inputs, held_out_inputs, known)
    setup = Setup(
        recipe=recipe,
        target=models[0],
        sources=tuple(models[1:]),
        corpus=corpus,
        held_out=held_out,
        row_bytes=_measure_rows(recipe, models[0], sample),
        known=known,
        warnings=list(dict.fromkeys(faults)),
        layout=layout,
        sample=sample,
    )
    return setup if layout is None else _look_up_done(setup, layout)


def _try(read: Callable[[], Answer], faults: list[str], what: str) -> Answer | None:
    """Return what can be read, or note why it cannot: a plan needs no file."""
    try:
        return read()
    except Exception as error:  # the clients of storages and of the hub share no class of errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        faults.append(f"{what}: {reason}")
        return None


def _list_all(documents: Documents, setting: str) -> list[InputFile]:
    return [file for each in documents for file in list_inputs(each, setting)]


def sample_documents(
    files: Sequence[InputFile], max_document_bytes: int
) -> Iterator[tuple[InputFile, list[Document]]]:
    """Yield the first documents of a few files that lie apart, those without faults.

    A data set of the hub is left out: it would be fetched whole.
    """
    at_hand = [file for file in files if file.num_bytes or file.format != "dataset"]
    step = max(1, len(at_hand) // SAMPLE_FILES)
    for file in at_hand[::step][:SAMPLE_FILES]:
        documents: list[Document] = []
        num_bytes = 0
        for document in islice(read_documents(file, max_document_bytes), SAMPLE_DOCUMENTS):
            if find_fault(document, max_document_bytes) is None:
                documents.append(document)
                num_bytes += len(document.text.encode())
            if num_bytes > SAMPLE_BYTES:
                break
        yield file, documents


def sample_rows(recipe: Recipe, files: Sequence[InputFile]) -> pa.Table | None:
    """Return rows cut from the first documents of a few files; None if they hold no text.

    Raises:
        ValueError: A tokenizer or a file cannot be read.
    """
    parts = sample_documents(files, recipe.corpus.max_document_bytes)
    documents = [document for _, part in parts for document in part]
    if not documents:
        return None
    target = load_recipe_tokenizer(recipe.target)
    others = [load_recipe_tokenizer(source) for source in recipe.sources]
    return build_rows(documents, target, [target, *others], max_tokens=recipe.corpus.max_tokens)


def _measure_model(
    recipe: Recipe, name: str, settings: ModelSettings, sample: pa.Table | None, known: list[str]
) -> Model:
    given = recipe.plan.models.get(name)
    if given is None:
        try:
            size = size_from_files(settings)
        except ValueError as error:
            raise ValueError(
                f"{name}: {error}; say its size instead: plan.models.{name}.parameters=7e9"
            ) from error
        known.append(f"{name}: {size.parameters:,.0f} weights, by its config.json")
    else:
        size = size_from_settings(given)
        known.append(f"{name}: {size.parameters:,.0f} weights, by plan.models.{name}")
    told = recipe.plan.bytes_per_token if given is None else given.bytes_per_token
    if sample is None or (given is not None and given.bytes_per_token is not None):
        return Model(name, size, told or recipe.plan.bytes_per_token)
    rows = load_recipe_tokenizer(settings).encode_rows(
        sample["text"].to_pylist(), sample["ends_document"].to_pylist()
    )
    num_bytes = sum(sample["num_bytes"].to_pylist())
    bytes_per_token = num_bytes / max(sum(map(len, rows)), 1)
    known.append(f"{name}: {bytes_per_token:.2f} bytes a token, counted in {num_bytes:,} bytes")
    return Model(name, size, bytes_per_token)


def _measure_rows(recipe: Recipe, target: Model, sample: pa.Table | None) -> float:
    if recipe.plan.row_tokens is not None or sample is None or not sample.num_rows:
        return (recipe.plan.row_tokens or recipe.corpus.max_tokens) * target.bytes_per_token
    return sum(sample["num_bytes"].to_pylist()) / sample.num_rows


def _measure_text(
    recipe: Recipe,
    target: Model,
    inputs: list[InputFile] | None,
    held_out_inputs: list[InputFile] | None,
    known: list[str],
) -> tuple[Text, Text]:
    plan = recipe.plan
    has_own = recipe.evaluate.documents is not None
    share = 0.0 if has_own else recipe.evaluate.held_out_share
    if plan.tokens is not None:
        whole = _imagine_text(recipe, plan.tokens * target.bytes_per_token / (1 - share))
        known.append(f"corpus: {plan.tokens:,.0f} tokens, by plan.tokens")
    elif inputs and all(file.num_bytes for file in inputs):
        whole = _size_text(recipe, inputs)
        known.append(
            f"corpus: {whole.num_bytes:,.0f} bytes of text, by the sizes of {len(inputs)} files"
        )
    else:
        raise ValueError(
            "corpus.documents do not tell how much text there is; say it: plan.tokens=1.8e9"
        )
    if has_own:
        held_out = _size_text(recipe, held_out_inputs) if held_out_inputs else Text(0.0, 0, 0)
        return whole, held_out
    return _take(recipe, whole, 1 - share), _take(recipe, whole, share)


def _shard_bytes(recipe: Recipe) -> int:
    return recipe.corpus.shard_tokens * BYTES_PER_TOKEN


def _imagine_text(recipe: Recipe, num_bytes: float) -> Text:
    shards = max(1, -(-num_bytes // _shard_bytes(recipe)))
    return Text(num_bytes, int(shards), 1)


def _size_text(recipe: Recipe, files: Sequence[InputFile]) -> Text:
    """Return what files hold, one shard for each group of them at least."""
    groups = group_inputs(files, _shard_bytes(recipe))
    sizes = [sum(_text_bytes(file, recipe.plan) for file in group) for group in groups]
    shards = sum(max(1, -(-size // _shard_bytes(recipe))) for size in sizes)
    return Text(float(sum(sizes)), int(shards), len(groups))


def _text_bytes(file: InputFile, plan: PlanSettings) -> float:
    return file.num_bytes * (plan.unpacked_ratio if file.is_packed else 1.0)


def _take(recipe: Recipe, text: Text, share: float) -> Text:
    """Return a share of a text's documents: every group of files still makes a shard."""
    num_bytes = text.num_bytes * share
    shards = max(text.files, -(-num_bytes // _shard_bytes(recipe)))
    return Text(num_bytes, int(shards), text.files)


def _look_up_done(setup: Setup, layout: Layout) -> Setup:
    """Return the setup with what is in the storage: exact numbers of rows that are cut."""
    for part in list_data_sets(layout):
        manifest = part.data.read_manifest()
        setup.done[part.stage, part.data.name] = (
            len(part.data.list_committed(setup.corpus.shards))
            if manifest is None
            else manifest.num_shards
        )
    for run in layout.runs:
        setup.done["train", run.name] = int("done.json" in layout.store.sizes(run.folder))
    setup.done["evaluate", ""] = int(is_stage_done("evaluate", layout))
    for name, data in (("corpus", layout.corpus), ("held_out", layout.held_out)):
        manifest = data.read_manifest()
        if manifest is None or not manifest.rows:
            continue
        num_bytes = sum(commit.stats["bytes"] for commit in data.commits().values())
        if setup.recipe.plan.tokens is None:
            text = replace(getattr(setup, name), num_bytes=num_bytes, shards=manifest.num_shards)
            setattr(setup, name, text)
        if name == "corpus":
            setup.row_bytes = num_bytes / manifest.rows
            exact = num_bytes / max(manifest.tokens, 1)
            setup.target = replace(setup.target, bytes_per_token=exact)
            setup.known.append(f"corpus: {manifest.tokens:,} tokens are cut by now")
    setup.sources = tuple(
        _count_captured(setup, model, layout.captured[model.name].read_manifest())
        for model in setup.sources
    )
    return setup


def _count_captured(setup: Setup, model: Model, manifest: Manifest | None) -> Model:
    """Return a source with its tokens as they were captured, where all are."""
    if manifest is None or not manifest.tokens:
        return model
    return replace(model, bytes_per_token=setup.corpus.num_bytes / manifest.tokens)
