"""Find the data sets of a run in its storage, without its models or documents."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.run.made_models import read_done
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import Store, open_store

STAGES = ("corpus", "captured", "aligned")
"""Folders of data sets below a run's storage."""

PARTS: dict[str, tuple[str, ...]] = {
    "corpus": ("corpus",),
    "captured": ("corpus", "capture"),
    "aligned": ("corpus", "capture", "align"),
}
"""The sections of a recipe by which the data sets of a stage differ, besides their models."""

MODEL_STAGE = "train"


@dataclass(frozen=True)
class RunData:
    """A recipe, and its data sets that are there."""

    recipe: Recipe
    corpus: DataSet | None
    captured: dict[str, DataSet] = field(default_factory=dict[str, DataSet])
    """By source."""
    aligned: dict[str, DataSet] = field(default_factory=dict[str, DataSet])
    """By source."""
    source: str | None = None
    """The source whose data set the user named."""


def find_run(uri: "str | os.PathLike[str]") -> RunData:
    """Find the recipe and the data sets of a run.

    Args:
        uri: The run's storage, or in it the folder of a data set or of a training, whose recipe is
            then taken.

    Raises:
        UserError: There is no run, or there are several with different recipes.
        ShardError: A record is corrupt.
    """
    address = os.fspath(uri).rstrip("/")
    root, stage, folder = _split(address)
    if folder:
        store = open_store(root)
        recipe = _read_recipe(store, f"{stage}/{folder}")
        if recipe is not None:
            return _gather(store, recipe, chosen=f"{stage}/{folder}")
    store = open_store(address)
    return _gather(store, _choose_recipe(store))


def _split(address: str) -> tuple[str, str, str]:
    """Split an address into root, stage and folder; both are empty if it names no such folder."""
    root, _, rest = address.rpartition("/")
    root, _, stage = root.rpartition("/")
    return (root, stage, rest) if stage in (*STAGES, MODEL_STAGE) else (address, "", "")


def _read_recipe(store: Store, folder: str) -> Recipe | None:
    """Read the recipe that a folder was made by; None if there is no record."""
    if folder.startswith(f"{MODEL_STAGE}/"):
        record = read_done(store, folder)
        return None if record is None else parse_recipe(record["recipe"])
    try:
        run = _name_data_set(store, folder).read_run()
    except FileNotFoundError:
        return None
    return parse_recipe(run["recipe"])


def _name_data_set(store: Store, folder: str) -> DataSet:
    stage, _, rest = folder.partition("/")
    name, _, fingerprint = rest.rpartition("-")
    return DataSet(store, stage, name, fingerprint)


def _choose_recipe(store: Store) -> Recipe:
    """Choose the recipe of a storage: that of its trainings, or without any of its rows.

    Raises:
        UserError: There is none, or there are several.
    """
    for stage in (MODEL_STAGE, "aligned", "captured"):
        folders = [f"{stage}/{folder}" for folder in store.folders(stage)]
        found = {folder: _read_recipe(store, folder) for folder in folders}
        recipes = {folder: recipe for folder, recipe in found.items() if recipe is not None}
        first = next(iter(recipes.values()), None)
        if first is None:
            continue
        widest = max(recipes.values(), key=lambda recipe: len(recipe.sources))
        if all(_is_part(recipe, widest) for recipe in recipes.values()):
            return widest
        raise UserError(
            f"storage {store.root} has results of several recipes: {', '.join(recipes)}; give the "
            "folder of one of them, or rayfuse.open_run(RECIPE).open_dataset()"
        )
    raise UserError(
        f"{store.root} has no aligned or captured rows; give the storage of a run, or the folder "
        "of one of its data sets"
    )


def _is_part(recipe: Recipe, other: Recipe) -> bool:
    """Check that a recipe is another one, or fuses with some of its sources.

    `rayfuse merge` trains such targets, and so does a run without a source that has failed.
    """
    own, wider = _describe(recipe), _describe(other)
    if own == wider:
        return True
    sources = own.pop("sources")
    if len(sources) < len(wider["sources"]):  # then it has no weights for the others
        for described in (own, wider):
            described["fuse"].pop("weights", None)
            described["train"].pop("baseline", None)
    return all(source in wider["sources"] for source in sources) and own == {
        name: value for name, value in wider.items() if name != "sources"
    }


def _describe(recipe: Recipe) -> dict[str, Any]:
    """List what decides a run's rows, and how they are fused and trained on."""
    sections = ("corpus", "target", "capture", "align", "fuse", "train")
    described = {name: getattr(recipe, name).dump_result_settings() for name in sections}
    return described | {"sources": [source.dump_result_settings() for source in recipe.sources]}


def _gather(store: Store, recipe: Recipe, chosen: str = "") -> RunData:
    """Find a recipe's data sets by the recipes in their records.

    Args:
        store: The storage.
        recipe: The recipe.
        chosen: The folder that the user named, which is taken where it fits.
    """

    def pick(stage: str, name: str) -> DataSet | None:
        folders = list(_list_folders(store, stage, name))
        if chosen in folders:
            return _name_data_set(store, chosen)
        fitting = [folder for folder in folders if _fits(store, folder, recipe, name)]
        if len(fitting) > 1:
            fitting = [f for f in fitting if _has_target(store, f, recipe)] or fitting
        if len(fitting) > 1:
            raise UserError(
                f"storage {store.root} has several data sets of one recipe: {', '.join(fitting)}; "
                "a model or a document has changed since: use rayfuse.open_run(RECIPE)"
                ".open_dataset(), which knows the newest"
            )
        return _name_data_set(store, fitting[0]) if fitting else None

    found = {
        stage: {source.name: pick(stage, source.name) for source in recipe.sources}
        for stage in ("captured", "aligned")
    }
    names = [source.name for source in recipe.sources]
    named = _name_data_set(store, chosen).name
    return RunData(
        recipe,
        pick("corpus", ""),
        **{stage: _drop_missing(of_stage.items()) for stage, of_stage in found.items()},
        source=named if named in names else None,
    )


def _drop_missing(found: Iterable[tuple[str, DataSet | None]]) -> dict[str, DataSet]:
    return {name: data for name, data in found if data is not None}


def _list_folders(store: Store, stage: str, name: str) -> Iterator[str]:
    """Yield the folders of a stage's data sets of one name."""
    for folder in store.folders(stage):
        if folder.rpartition("-")[0] == name:
            yield f"{stage}/{folder}"


def _fits(store: Store, folder: str, recipe: Recipe, name: str) -> bool:
    """Check that a data set was made by the settings that a recipe has."""
    found = _read_recipe(store, folder)
    if found is None:
        return False
    sections = PARTS[folder.partition("/")[0]]
    own, other = (
        [getattr(of, section).dump_result_settings() for section in sections]
        + [source.dump_result_settings() for source in of.sources if source.name == name]
        for of in (found, recipe)
    )
    return own == other


def _has_target(store: Store, folder: str, recipe: Recipe) -> bool:
    found = _read_recipe(store, folder)
    target = recipe.target.dump_result_settings()
    return found is not None and found.target.dump_result_settings() == target
