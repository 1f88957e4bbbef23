"""Name what `rayfuse merge` makes: a target per source, their merges, and the scores of all.

The targets are trained on the rows of the complete recipe: nothing is captured again. Reads the
records of the aligned rows, and no row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.merge import MergeSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.fuse.source_filter import select_active_sources
from rayfuse.models.files import read_model_files
from rayfuse.run.fingerprint import fingerprint_of, fingerprint_training
from rayfuse.run.layout import EvaluationFiles, Layout, TrainRun
from rayfuse.run.made_models import identify_model, is_made, read_inputs
from rayfuse.run.prepare import TARGET

MIN_MODELS = 2


class NothingToMergeError(UserError):
    """A recipe has no two targets that could be merged, so that nothing is stored for it."""


@dataclass(frozen=True)
class Pair:
    """The fusion of the target with one source."""

    source: str
    recipe: Recipe
    """The recipe with this source alone."""
    layout: Layout
    """Its folders, on the rows of the complete recipe."""

    @property
    def run(self) -> TrainRun:
        """Its only training."""
        return self.layout.runs[0]

    def is_trained(self) -> bool:
        """Check that its target is trained, on the rows that there are now.

        Raises:
            ShardError: A record is corrupt.
        """
        return is_made(self.layout.store, self.run.folder, read_inputs(self.layout, self.run))


@dataclass(frozen=True)
class MergePlan:
    """Everything that `rayfuse merge` makes, by name."""

    recipe: Recipe
    layout: Layout
    """The complete run; its evaluation has the scores of the models below as well, and of no
    source."""
    pairs: tuple[Pair, ...]
    merges: Mapping[str, str]
    """The method of each merge, by the merge's name."""
    noise: tuple[str, ...]
    """The sources that fusion skips as noise, and that have no target of their own."""
    results_file: str

    def folder_of(self, merge: str) -> str:
        """Name the folder of a merge, below the storage root."""
        return self.layout.evaluation.merged_pairs[merge]

    def list_models(self) -> list[str]:
        """List the models to compare: the complete recipe's trainings as far as they are done.

        Raises:
            ShardError: A record is corrupt.
        """
        own = {pair.run.name for pair in self.pairs}
        layout = self.layout
        trained = [
            run.name
            for run in layout.runs
            if run.name not in own and is_made(layout.store, run.folder, read_inputs(layout, run))
        ]
        return [TARGET, *trained, *(pair.run.name for pair in self.pairs), *self.merges]

    def read_inputs(self) -> dict[str, str]:
        """Read what the merges are made from now: the files of each target, by its name.

        Raises:
            ShardError: A record is corrupt.
        """
        store = self.layout.store
        found = {pair.run.name: identify_model(store, pair.run.folder) for pair in self.pairs}
        return {name: identity for name, identity in found.items() if identity is not None}

    def list_unmerged(self) -> list[str]:
        """List the merges that are missing or stale.

        Raises:
            ShardError: A record is corrupt.
        """
        store, inputs = self.layout.store, self.read_inputs()
        return [name for name in self.merges if not is_made(store, self.folder_of(name), inputs)]

    def list_items(self) -> set[str]:
        """List what is stored of all this: folders and files, both without suffix."""
        evaluation = self.layout.evaluation
        files = [*evaluation.scores.values(), self.results_file]
        return {
            *(pair.run.folder for pair in self.pairs),
            *evaluation.merged_pairs.values(),
            *(file.rpartition(".")[0] for file in files),
        }


def plan_merge(recipe: Recipe, layout: Layout) -> MergePlan:
    """Name the folders of the targets, of the merges and of their scores.

    Args:
        recipe: The complete recipe.
        layout: Its run.

    Raises:
        NothingToMergeError: There are fewer than two sources to fuse with, nothing is learned from
            them, or the target has an adapter.
        UserError: A method does not fit, or no target has a weight.
        ShardError: A record is corrupt.
    """
    check_settings(recipe)
    active, noise = select_active_sources(layout.aligned, recipe.fuse)
    _check_sources([*active], noise)
    recipe.merge.list_weights([*active])
    pairs = tuple(_plan_pair(recipe, layout, name) for name in active)
    merges = {f"merged-{name}": name for name in recipe.merge.choose_methods(len(pairs))}
    fingerprints = {
        name: _fingerprint_merge(recipe, pairs, method) for name, method in merges.items()
    }
    folders = {name: f"merge/{merges[name]}-{fp}" for name, fp in fingerprints.items()}
    models = {pair.run.name: pair.run.fingerprint for pair in pairs} | fingerprints
    runs = (*layout.runs, *(pair.run for pair in pairs))
    names = [TARGET, *(run.name for run in layout.runs)]
    text = layout.held_out.fingerprint
    scores = {name: layout.evaluation.scores[name] for name in names} | {
        name: f"evaluate/{name}-{fingerprint_of(model=model, text=text)}.json"
        for name, model in models.items()
    }
    evaluation = EvaluationFiles(scores=scores, merged_pairs=folders)
    results = fingerprint_of(scores=scores, samples=recipe.evaluate.bootstrap_samples)
    return MergePlan(
        recipe=recipe,
        layout=replace(layout, runs=runs, evaluation=evaluation),
        pairs=pairs,
        merges=merges,
        noise=noise,
        results_file=f"merge/results-{results}.json",
    )


def check_settings(recipe: Recipe) -> None:
    """Check that a recipe can be merged, without reading any record.

    Raises:
        NothingToMergeError: There are fewer than two sources to fuse with, nothing is learned from
            them, or the target has an adapter.
    """
    weights = recipe.fuse.weights
    _check_sources([s.name for s in recipe.sources if weights.get(s.name, 1.0) > 0], ())
    if not recipe.train.is_fused:
        raise NothingToMergeError(
            "train.lambda is 1, so that all targets learn from the text alone and are the same; "
            "set it below 1"
        )
    if recipe.target.adapter is not None:
        raise NothingToMergeError(
            f"target.adapter is {recipe.target.adapter!r}, which is not in the target's weight "
            "files; merge it into them (merge_and_unload of peft), and name that folder as "
            "target.model"
        )


def _check_sources(active: list[str], noise: tuple[str, ...]) -> None:
    """Check that there are targets to merge.

    Raises:
        NothingToMergeError: There is one at most.
    """
    if len(active) >= MIN_MODELS:
        return
    skipped = f" ({', '.join(noise)}: skipped as noise, see fuse.skip_noise)" if noise else ""
    raise NothingToMergeError(
        f"rayfuse merge needs {MIN_MODELS} sources or more, to fuse the target with each, but the "
        f"recipe has {len(active)}{skipped}: {', '.join(active) or 'none'}; add sources, or set "
        "their fuse.weights above 0"
    )


def _plan_pair(recipe: Recipe, layout: Layout, source: str) -> Pair:
    """Plan the fusion with one source, on the rows that the complete recipe has captured."""
    own = recipe.model_copy(
        update={
            "sources": tuple(one for one in recipe.sources if one.name == source),
            "fuse": recipe.fuse.model_copy(update={"weights": {}}),  # of no effect on one source
            "train": recipe.train.model_copy(update={"baseline": False}),
            "merge": MergeSettings(),
        }
    )
    aligned = {source: layout.aligned[source]}
    fingerprint = fingerprint_training(
        own,
        read_model_files(recipe.target),
        corpus=layout.corpus.fingerprint,
        held_out=layout.held_out.fingerprint,
        aligned=[aligned[source].fingerprint],
    )
    run = TrainRun(f"fused-{source}", f"train/fused-{fingerprint}", fingerprint, is_fused=True)
    folders = replace(
        layout,
        captured={source: layout.captured[source]},
        aligned=aligned,
        map_files={name: file for name, file in layout.map_files.items() if name == source},
        runs=(run,),
        evaluation=EvaluationFiles(scores={}),
        recipe=dump_recipe(own),
    )
    return Pair(source, own, folders)


def _fingerprint_merge(recipe: Recipe, pairs: tuple[Pair, ...], method: str) -> str:
    """Hash what decides the weights of a merge. The order of the models decides ties."""
    settings: dict[str, Any] = recipe.merge.dump_method(method)
    if "weights" in settings:
        settings["weights"] = recipe.merge.list_weights([pair.source for pair in pairs])
    models = [[pair.source, pair.run.fingerprint] for pair in pairs]
    return fingerprint_of(models=models, **settings)
