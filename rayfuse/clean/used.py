"""Which items of a storage a recipe uses: those that its layout names, and models inside it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayfuse.align.task import record_of_map
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.merge.plan import NothingToMergeError, plan_merge
from rayfuse.run.layout import Layout
from rayfuse.storage.store import Store


def list_used(recipe: Recipe, layout: Layout) -> set[str]:
    """List the items that a recipe uses: folders and files, both without suffix, below the root."""
    evaluation = layout.evaluation
    data_sets = [
        layout.corpus,
        layout.held_out,
        *layout.captured.values(),
        *layout.aligned.values(),
        *evaluation.token_nll.values(),
    ]
    files = [*evaluation.list_files(), *layout.map_files.values()]
    files += [record_of_map(file) for file in layout.map_files.values()]
    files += [file for by_task in evaluation.task_nll.values() for file in by_task.values()]
    merged = [evaluation.merge.folder] if evaluation.merge.folder else []
    return {
        *(data.folder for data in data_sets),
        *(run.folder for run in layout.runs),
        *(file.rpartition(".")[0] for file in files),
        *merged,
        *_list_merge(recipe, layout),
        *_list_inside(recipe, layout.store),
    }


def _list_merge(recipe: Recipe, layout: Layout) -> set[str]:
    """List what `rayfuse merge` makes.

    Raises:
        UserError: A setting of `merge` does not fit, so that the folders have no names.
    """
    try:
        return plan_merge(recipe, layout).list_items()
    except NothingToMergeError:
        return set()


def list_scored(layout: Layout) -> set[str]:
    """List the folders of token NLL whose source has its score: they are written, but never closed.

    The score comes last, so nothing else shows whether all of the token NLL is there.
    """
    evaluation = layout.evaluation
    present = layout.store.sizes("evaluate")
    return {
        data.folder
        for name, data in evaluation.token_nll.items()
        if evaluation.scores[name].removeprefix("evaluate/") in present
    }


def _list_inside(recipe: Recipe, store: Store) -> Iterator[str]:
    """Yield the items that settings name by their path, such as a model that a run has made."""
    for text in _list_texts(dump_recipe(recipe)):
        below = _find_below(text, store)
        if below:
            yield "/".join(below.split("/")[:2])


def _find_below(text: str, store: Store) -> str | None:
    """Find the name of a path below the root; None for any other text."""
    if not store.is_local:
        is_below = text.startswith(f"{store.root}/")
        return text.removeprefix(f"{store.root}/") if is_below else None
    if "://" in text and not text.startswith("file://"):
        return None
    path = os.path.realpath(Path(text.removeprefix("file://")).expanduser())
    root = os.path.realpath(store.root)
    return os.path.relpath(path, root) if path.startswith(f"{root}/") else None


def _list_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _list_texts(item)
