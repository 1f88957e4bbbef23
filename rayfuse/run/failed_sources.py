"""Sources with `required: false`: a run continues without one whose capture has failed.

The failure is recorded in the source's captured data set, and counts until the capture is complete
or a setting that it may depend on is changed; only then is the source captured again.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from rayfuse.config.models import SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.config.text import show_on_one_line
from rayfuse.run.fingerprint import fingerprint_of
from rayfuse.run.layout import Layout, name_folders
from rayfuse.run.prepare import AlignFacts, check_recipe
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.seal import ShardError, seal, unseal

FAILURE_FILE = "failure.json"


def plan_run(recipe: Recipe, align: AlignFacts) -> Layout:
    """Check a recipe and name the folders of its run, without the sources that have failed.

    Rows stay split for all sources, so that a source that is captured later finds its own rows.

    Args:
        recipe: The recipe.
        align: `rayfuse.align.facts.ALIGN_FACTS`.

    Returns:
        The layout, whose `failed` lists these sources; `drop_sources` makes the recipe fit it.

    Raises:
        UserError: A model, a pair of tokenizers, the documents or the tasks cannot be used.
    """
    found = check_recipe(recipe, align)
    layout = name_folders(recipe, found)
    failed = read_failures(recipe, layout)
    if not failed:
        return layout
    return replace(name_folders(drop_sources(recipe, failed), found), failed=failed)


def drop_sources(recipe: Recipe, names: Collection[str]) -> Recipe:
    """Remove sources, but not all, and their weights in the fusion, from a recipe."""
    if not names:
        return recipe
    sources = tuple(source for source in recipe.sources if source.name not in names)
    weights = {name: weight for name, weight in recipe.fuse.weights.items() if name not in names}
    fuse = recipe.fuse.model_copy(update={"weights": weights})
    return recipe.model_copy(update={"sources": sources, "fuse": fuse})


def record_failure(recipe: Recipe, layout: Layout, name: str, reason: str) -> None:
    """Record that the capture of a source has failed, with the reason."""
    source = next(source for source in recipe.sources if source.name == name)
    captured = layout.captured[name]
    record = {"reason": reason, "settings": _identify(recipe, source)}
    captured.store.write(f"{captured.folder}/{FAILURE_FILE}", seal(record))


def forget_failure(captured: DataSet) -> None:
    """Remove the record of a failure: the capture is complete, and may be lost by other causes."""
    captured.store.remove(f"{captured.folder}/{FAILURE_FILE}")


def list_fused(recipe: Recipe) -> set[str]:
    """Name the sources that fusion learns from: those with a weight."""
    weights = recipe.fuse.weights
    return {source.name for source in recipe.sources if weights.get(source.name, 1.0) > 0}


def read_failures(recipe: Recipe, layout: Layout) -> dict[str, str]:
    """Read the sources that a run does without, by name, each with the reason.

    A corrupt record counts as none: the source is captured again. So are all if no other source
    is left that fusion learns from.
    """
    reasons: dict[str, str] = {}
    for source in recipe.sources:
        record = None if source.required else _read_record(layout, source.name)
        if record is None or record["settings"] != _identify(recipe, source):
            continue
        if not layout.captured[source.name].is_complete():
            reasons[source.name] = str(record["reason"])
    return {} if list_fused(recipe) <= reasons.keys() else reasons


def describe_failed(failed: Mapping[str, str]) -> list[str]:
    """Describe the sources that a run does without, in one sentence each."""
    return [
        f"Source {name} is not part of this run: its capture failed ({show_on_one_line(reason)})."
        for name, reason in failed.items()
    ]


def _identify(recipe: Recipe, source: SourceSettings) -> str:
    """Hash the settings that decide whether a capture fails."""
    return fingerprint_of(
        source=source.model_dump(mode="json"), capture=recipe.capture.model_dump(mode="json")
    )


def _read_record(layout: Layout, name: str) -> dict[str, Any] | None:
    captured = layout.captured[name]
    file = f"{captured.folder}/{FAILURE_FILE}"
    try:
        return unseal(captured.store.read(file), f"{captured.store.root}/{file}")
    except (FileNotFoundError, ShardError):
        return None
