"""Name the folders of a recipe's run by fingerprints; checks and reads nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayfuse.config.align import METHODS
from rayfuse.config.models import ModelSettings, TrainedSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.run.fingerprint import (
    fingerprint_aligned,
    fingerprint_captured,
    fingerprint_imported,
    fingerprint_map,
    fingerprint_of,
    fingerprint_training,
)
from rayfuse.run.prepare import TARGET, AlignFacts, Prepared, SplitDocuments, check_recipe
from rayfuse.run.segmentation import place_rows
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class TrainRun:
    """One training of the target."""

    name: str
    """`fused` or `clm`; of a target that is fused with one source to be merged, `fused-SOURCE`."""
    folder: str
    """Below the storage root; contains checkpoints, metrics and the model."""
    fingerprint: str
    is_fused: bool
    """Whether the target also learns from the sources."""


@dataclass(frozen=True)
class Merge:
    """The target and the sources whose weights are averaged, as a baseline."""

    folder: str | None = None
    """Below the storage root; contains the model. None if no source can be averaged."""
    sources: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict[str, str])
    """The other sources, each with the reason why its weights cannot be averaged."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFiles:
    """Where evaluation stores its results, below the storage root."""

    scores: dict[str, str]
    """Bits per byte by model: sources, `target`, `clm`, `fused`, `ensemble`, `merged`."""
    token_nll: dict[str, DataSet] = field(default_factory=dict[str, DataSet])
    """NLL of the held-out rows by source of the ensemble, token by token."""
    merge: Merge = Merge()
    merged_pairs: dict[str, str] = field(default_factory=dict[str, str])
    """Folders of the merges of targets that were fused with one source each, by name."""
    task_scores: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """Task scores by model and task."""
    task_nll: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """NLL of the tasks' answers by source of the ensemble and task, token by token."""

    def list_files(self) -> list[str]:
        """List all files that the report is made from."""
        tasks = (file for files in self.task_scores.values() for file in files.values())
        return [*self.scores.values(), *tasks]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders of one recipe's run, stage by stage."""

    store: Store
    corpus: DataSet
    corpus_documents: SplitDocuments
    held_out: DataSet
    held_out_documents: SplitDocuments
    captured: dict[str, DataSet]
    """Captured rows by source."""
    aligned: dict[str, DataSet]
    """Aligned rows by source."""
    map_files: dict[str, str]
    """Stored vocabulary maps by source; empty for methods that store none."""
    runs: tuple[TrainRun, ...]
    evaluation: EvaluationFiles
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    """The resolved recipe, as plain values."""
    failed: Mapping[str, str] = field(default_factory=dict[str, str])
    """The sources that the run does without, as their capture has failed, each with the reason."""

    @property
    def has_selection(self) -> bool:
        """Whether half of the held-out documents choose weights, and do not compare models."""
        return self.recipe.get("train", {}).get("publish") == "best"

    def input_fingerprint(self) -> str:
        """Hash the names of all results in the report."""
        results = sorted(self.evaluation.list_files())
        return fingerprint_of(evaluations=results, runs=[run.folder for run in self.runs])


def plan_layout(recipe: Recipe, align: AlignFacts) -> Layout:
    """Check a recipe and name the folders of its run.

    Args:
        recipe: The recipe.
        align: `rayfuse.align.facts.ALIGN_FACTS`.

    Raises:
        UserError: A model, a pair of tokenizers, the documents or the tasks cannot be used.
    """
    return name_folders(recipe, check_recipe(recipe, align))


def name_folders(recipe: Recipe, found: Prepared) -> Layout:
    """Name the folders of a run.

    Args:
        recipe: The recipe.
        found: The result of `check_recipe`.
    """
    store, target = found.store, found.tokenizers[TARGET]
    corpus = place_rows(store, "", found.corpus.segmentation.fingerprint, target)
    held_out = place_rows(store, "held-out", found.held_out.segmentation.fingerprint, target)
    captured = _name_captured(recipe, found, corpus)
    aligned = _name_aligned(recipe, found, captured, corpus)
    runs = _name_runs(recipe, found, (corpus, held_out), aligned)
    return Layout(
        store=store,
        corpus=corpus,
        corpus_documents=found.corpus,
        held_out=held_out,
        held_out_documents=found.held_out,
        captured=captured,
        aligned=aligned,
        map_files=_name_maps(recipe, found, corpus),
        runs=runs,
        evaluation=_name_evaluation(recipe, found, held_out, runs),
        recipe=dump_recipe(recipe),
    )


def _name_captured(recipe: Recipe, found: Prepared, corpus: DataSet) -> dict[str, DataSet]:
    rows = found.corpus.segmentation.fingerprint
    fingerprints = {
        source.name: fingerprint_captured(
            recipe,
            source,
            found.models[source.name],
            tokenizer=found.tokenizers[source.name],
            rows=rows,
        )
        if source.captured_from is None
        else fingerprint_imported(
            recipe, source, tokenizer=found.tokenizers[source.name], rows=rows
        )
        for source in recipe.sources
    }
    return {
        name: DataSet(found.store, "captured", name, fingerprint, (corpus,))
        for name, fingerprint in fingerprints.items()
    }


def _name_aligned(
    recipe: Recipe, found: Prepared, captured: dict[str, DataSet], corpus: DataSet
) -> dict[str, DataSet]:
    fingerprints = {
        name: fingerprint_aligned(
            data.fingerprint,
            recipe.align,
            target_tokenizer=found.tokenizers[TARGET],
            version=found.align.version,
        )
        for name, data in captured.items()
    }
    return {
        name: DataSet(found.store, "aligned", name, fingerprint, (corpus, captured[name]))
        for name, fingerprint in fingerprints.items()
    }


def _name_maps(recipe: Recipe, found: Prepared, corpus: DataSet) -> dict[str, str]:
    """Name the stored vocabulary maps: by the pair of tokenizers, and by the text if it counts."""
    method = recipe.align.method
    stored_map = METHODS[method].stored_map
    if stored_map is None:
        return {}
    text = corpus.fingerprint if stored_map == "per_corpus" else None
    fingerprints = {
        source.name: fingerprint_map(
            [found.tokenizers[source.name], found.tokenizers[TARGET]],
            text=text,
            method=method,
            version=found.align.version,
        )
        for source in recipe.sources
    }
    return {
        name: f"maps/{name}-{fingerprint}.parquet" for name, fingerprint in fingerprints.items()
    }


def _name_runs(
    recipe: Recipe,
    found: Prepared,
    rows: tuple[DataSet, DataSet],
    aligned: dict[str, DataSet],
) -> tuple[TrainRun, ...]:
    """Name the trainings; `rows` are the corpus and the held-out rows."""
    corpus, held_out = (data.fingerprint for data in rows)
    target, distributions = found.models[TARGET], [data.fingerprint for data in aligned.values()]
    text = {"corpus": corpus, "held_out": held_out}
    fused = fingerprint_training(recipe, target, **text, aligned=distributions)
    runs = [TrainRun("fused", f"train/fused-{fused}", fused, recipe.train.is_fused)]
    if recipe.train.baseline:
        clm = fingerprint_training(recipe, target, **text, aligned=None)
        runs.append(TrainRun("clm", f"train/clm-{clm}", clm, False))
    return tuple(runs)


def _name_evaluation(
    recipe: Recipe, found: Prepared, held_out: DataSet, runs: tuple[TrainRun, ...]
) -> EvaluationFiles:
    merge = _name_merge(recipe, found)
    ensemble = [
        source.name for source in recipe.sources if recipe.fuse.weights.get(source.name, 1.0) > 0
    ]
    are_run = {source.name for source in recipe.run_sources}
    if len(ensemble) == 1 or not are_run.issuperset(ensemble):
        ensemble = []  # of one source it is that source; of imported ones it cannot be computed
    models = _identify_scored(recipe, found, ensemble, merge, runs)
    fingerprints = {
        name: fingerprint_of(model=model, text=held_out.fingerprint)
        for name, model in models.items()
    }
    stems = _name_task_results(recipe, found, models)
    return EvaluationFiles(
        scores={
            name: f"evaluate/{name}-{fingerprint}.json"
            for name, fingerprint in fingerprints.items()
        },
        token_nll={
            name: DataSet(
                found.store, "evaluate", f"tokens-{name}", fingerprints[name], (held_out,)
            )
            for name in ensemble
        },
        merge=merge,
        task_scores=_add_suffix(stems, ".json"),
        task_nll=_add_suffix({name: stems[name] for name in ensemble if name in stems}, ".parquet"),
    )


def _identify_scored(
    recipe: Recipe,
    found: Prepared,
    ensemble: list[str],
    merge: Merge,
    runs: tuple[TrainRun, ...],
) -> dict[str, Any]:
    """Identify each scored model, by its name in tables, for fingerprints."""
    models: dict[str, Any] = {
        source.name: [found.models[source.name].identity, source.dtype]
        for source in recipe.run_sources
    }
    if recipe.corpus.is_chat:  # the template is no part of a model's identity
        for source in recipe.run_sources:
            models[source.name].append(found.tokenizers[source.name])
    models[TARGET] = [found.models[TARGET].identity, recipe.target.dtype]
    models |= {run.name: run.fingerprint for run in runs}
    if ensemble:
        models["ensemble"] = sorted(models[name] for name in ensemble)
    if merge.folder is not None:
        models["merged"] = [merge.folder, recipe.target.dtype]
    return models


def _name_merge(recipe: Recipe, found: Prepared) -> Merge:
    excluded = {
        source.name: found.unmergeable[source.name]
        for source in recipe.sources
        if source.name in found.unmergeable
    }
    names = tuple(source.name for source in recipe.sources if source.name not in excluded)
    if not names:
        return Merge(excluded=excluded)
    others = sorted(found.models[name].identity for name in names)
    fingerprint = fingerprint_of(first=found.models[TARGET].identity, others=others)
    return Merge(f"evaluate/merged-model-{fingerprint}", names, excluded)


def _name_task_results(
    recipe: Recipe, found: Prepared, models: dict[str, Any]
) -> dict[str, dict[str, str]]:
    """Name the results of each model at each task, without the files' suffixes."""
    tasks = recipe.evaluate.tasks
    if tasks is None or found.tasks is None:
        return {}
    facts = found.tasks
    if recipe.corpus.is_chat:  # the target's template asks the models that are made from it
        facts = facts | {"chat": found.tokenizers[TARGET]}
    return {
        name: {
            task: f"evaluate/task-{name}-{task}-" + fingerprint_of(model=model, task=task, **facts)
            for task in tasks.names
        }
        for name, model in models.items()
    }


def _add_suffix(stems: dict[str, dict[str, str]], suffix: str) -> dict[str, dict[str, str]]:
    return {
        name: {task: stem + suffix for task, stem in by_task.items()}
        for name, by_task in stems.items()
    }


def describe_model(recipe: Recipe, name: str, layout: Layout) -> ModelSettings:
    """Find the settings of a model by its name in tables.

    Raises:
        KeyError: There is no model of this name.
    """
    if name == TARGET:
        return recipe.target
    for source in recipe.sources:
        if source.name == name:
            return source
    folder = find_own_folder(name, layout)
    if folder is None:
        raise KeyError(name)
    return TrainedSettings(
        model=f"{layout.store.root}/{folder}",
        dtype=recipe.target.dtype,
        trust_remote_code=recipe.target.trust_remote_code,
        target=recipe.target,
    )


def find_own_folder(name: str, layout: Layout) -> str | None:
    """Name the folder of a model that this run makes, below the storage root; None for others."""
    merge = layout.evaluation.merge
    if name == "merged" and merge.folder is not None:
        return f"{merge.folder}/model"
    if name in layout.evaluation.merged_pairs:
        return f"{layout.evaluation.merged_pairs[name]}/model"
    run = next((run for run in layout.runs if run.name == name), None)
    return None if run is None else f"{run.folder}/model"
