"""Check what a recipe names before a cluster is used: models, tokenizers, documents, storage.

What the checks find decides the names of a run's folders (`rayfuse.run.layout`).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.models.chat import ChatFormat, identify_format, load_chat_format
from rayfuse.models.files import (
    ModelFiles,
    check_model,
    check_tensors,
    find_difference,
    load_recipe_tokenizer,
)
from rayfuse.models.tokenizer import TextTokenizer, describe_class_difference
from rayfuse.run.fingerprint import describe_split
from rayfuse.run.inputs import InputFile, list_documents
from rayfuse.run.segmentation import Segmentation, plan_segmentation
from rayfuse.run.tasks import describe_tasks
from rayfuse.storage.store import Store, open_store

TARGET = "target"


@dataclass(frozen=True)
class AlignFacts:
    """What checks and folder names depend on in `rayfuse.align`, which this package cannot import.

    The instance to pass is `rayfuse.align.facts.ALIGN_FACTS`.
    """

    version: int
    """The version of the alignment's code."""
    check_pair: Callable[[TextTokenizer, TextTokenizer], None]
    """Raises UserError if a source's and the target's tokenizer cannot be aligned."""


@dataclass(frozen=True)
class SplitDocuments:
    """Documents as they were listed, and how they are split into rows."""

    files: tuple[InputFile, ...]
    segmentation: Segmentation
    skipped: Mapping[str, int] = field(default_factory=Counter[str])
    """How many files of folders were not taken, by the reason."""


@dataclass(frozen=True)
class Prepared:
    """The result of checking a recipe: all inputs of the folder names."""

    store: Store
    models: dict[str, ModelFiles]
    """The files of each source that is not imported, by its name, and of `target`."""
    tokenizers: dict[str, str]
    """Hashes of their tokenizers, by the same names."""
    corpus: SplitDocuments
    held_out: SplitDocuments
    unmergeable: dict[str, str]
    """The sources whose weights cannot be averaged with the target's, each with the reason."""
    tasks: dict[str, Any] | None
    """What decides task scores besides model and task; None without tasks."""
    align: AlignFacts


def check_recipe(recipe: Recipe, align: AlignFacts) -> Prepared:
    """Check that the models, documents, storage and tasks of a recipe can be used.

    Reads model files and lists documents, but reads none of their text.

    Args:
        recipe: The recipe.
        align: `rayfuse.align.facts.ALIGN_FACTS`.

    Raises:
        UserError: A model, a pair of tokenizers, the documents or the tasks cannot be used.
    """
    models = _check_models(recipe)
    _check_pairs(recipe, align)
    store = open_store(recipe.storage, recipe.storage_retry_seconds)
    corpus, held_out = _plan_documents(recipe, store)
    tokenizers = {
        name: identify_format(settings, is_chat=recipe.corpus.is_chat)
        for name, settings in _list_models(recipe).items()
    }
    tasks = recipe.evaluate.tasks
    return Prepared(
        store=store,
        models=models,
        tokenizers=tokenizers,
        corpus=corpus,
        held_out=held_out,
        unmergeable=_find_unmergeable(recipe, models),
        tasks=None if tasks is None else describe_tasks(tasks),
        align=align,
    )


def _list_models(recipe: Recipe) -> dict[str, Any]:
    return {TARGET: recipe.target} | {source.name: source for source in recipe.sources}


def _list_run_models(recipe: Recipe) -> dict[str, Any]:
    return {TARGET: recipe.target} | {source.name: source for source in recipe.run_sources}


def _check_models(recipe: Recipe) -> dict[str, ModelFiles]:
    return {
        name: check_model(
            settings,
            recipe.corpus.max_tokens,
            role=_describe_role(name),
        )
        for name, settings in _list_run_models(recipe).items()
    }


def list_tokenizer_notes(recipe: Recipe) -> list[str]:
    """List what a user should know of the tokenizers, one line per model at most."""
    notes: list[str] = []
    for name, settings in _list_models(recipe).items():
        tokenizer = load_recipe_tokenizer(settings)
        difference = describe_class_difference(
            settings.model, settings.revision, settings.trust_remote_code
        )
        found = [] if difference is None else [difference]
        missing = [
            role
            for role, token_id in (("BOS", tokenizer.start_id), ("EOS", tokenizer.eos_id))
            if token_id is None
        ]
        if missing:
            found.append(
                f"no file of its tokenizer names {' and '.join(missing)}, so its rows have none; "
                "if the model was trained with them, name them in tokenizer_config.json"
            )
        if recipe.corpus.is_chat:
            found += _list_template_notes(load_chat_format(settings))
        notes += [f"{_describe_role(name)}: {note}" for note in found]
    return notes


def _list_template_notes(chat: ChatFormat) -> list[str]:
    notes: list[str] = []
    if not chat.takes_system:
        notes.append("its chat template puts system messages before the user's first message")
    if chat.end_id is None:
        notes.append(
            "no control token ends an answer in its chat template, so the end is not learned; a "
            "base model needs a template with its own EOS"
        )
    return notes


def _describe_role(name: str) -> str:
    return TARGET if name == TARGET else f"source {name}"


def check_weights(recipe: Recipe) -> None:
    """Check that each model folder holds exactly the tensors of its model; loads none.

    Raises:
        UserError: A tensor is missing, has another shape, or has no use.
    """
    for name, settings in _list_run_models(recipe).items():
        check_tensors(settings, role=_describe_role(name))


def _check_pairs(recipe: Recipe, align: AlignFacts) -> None:
    target = load_recipe_tokenizer(recipe.target)
    for source in recipe.sources:
        try:
            align.check_pair(load_recipe_tokenizer(source), target)
        except ValueError as error:  # UserError is one; tokens that cannot be placed raise another
            raise UserError(f"source {source.name}: {error}") from error


def _plan_documents(recipe: Recipe, store: Store) -> list[SplitDocuments]:
    """List the documents of corpus and held-out rows, and plan how each is split."""
    own = recipe.evaluate.documents
    inputs = list_documents(recipe.corpus.documents, "corpus.documents")
    held_out = inputs if own is None else list_documents(own, "evaluate.documents")
    share = recipe.evaluate.held_out_share if own is None else 0.0
    return [
        SplitDocuments(
            files=tuple(file for found in lists for file in found.files),
            segmentation=plan_segmentation(
                store,
                name,
                describe_split(recipe, [found.files for found in lists], share),
                (recipe.target, *recipe.sources),
                resplit=recipe.corpus.resplit,
                is_chat=recipe.corpus.is_chat,
            ),
            skipped=sum((Counter(found.skipped) for found in lists), Counter[str]()),
        )
        for name, lists in (("", inputs), ("held-out", held_out))
    ]


def _find_unmergeable(recipe: Recipe, models: dict[str, ModelFiles]) -> dict[str, str]:
    """Find the sources whose files cannot be averaged with the target's, each with the reason."""
    tokenizers = {
        name: load_recipe_tokenizer(settings).content_hash
        for name, settings in _list_models(recipe).items()
    }
    adapted = {name for name, settings in _list_models(recipe).items() if settings.adapter}
    target = models[TARGET]
    imported = {source.name for source in recipe.sources}.difference(models)
    reasons = dict.fromkeys(sorted(imported), "it is imported, and its weights are not read")
    for name, files in models.items():
        difference = find_difference(target, files)
        if name == TARGET:
            continue
        if files.identity == target.identity:
            reasons[name] = "it is the target itself"
        elif adapted & {name, TARGET}:
            owner = "it" if name in adapted else "the target"
            reasons[name] = f"{owner} has an adapter, which is not in the weight files"
        elif difference is not None:
            reasons[name] = difference
        elif tokenizers[name] != tokenizers[TARGET]:
            reasons[name] = "its tokenizer is not the target's"
    return reasons
