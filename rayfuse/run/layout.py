"""Where each data set and result of a recipe lies: folders named by fingerprints."""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from rayfuse.config.align import METHODS
from rayfuse.config.corpus import Documents
from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.inspect.report import check_pair
from rayfuse.models.files import ModelFiles, check_model, find_difference, load_recipe_tokenizer
from rayfuse.run.fingerprint import fingerprint_of, first_name
from rayfuse.run.inputs import InputFile, list_inputs
from rayfuse.run.segmentation import Segmentation, plan_segmentation
from rayfuse.run.tasks import describe_tasks
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import Store, open_store

ALIGN_RULES = 4
"""Goes up when the same shards are aligned otherwise than before: no stale map or row is met then.
2: `min_edit_distance` counts distances beyond 255 bytes, a row's costs do not depend on the next
row (LOG.md).
3: tokens that share a character are placed by what they spell where a tokenizer changes its text.
4: a token that ends inside a character goes to the tail if what follows may change the target's.
"""


@dataclass(frozen=True)
class TrainRun:
    """One training of the target."""

    name: str
    """`fused` or `clm`."""
    folder: str
    """Below the storage root; checkpoints, metrics and the model lie in it."""
    fingerprint: str
    is_fused: bool
    """It learns from the sources too."""


@dataclass(frozen=True)
class Merge:
    """The target and the sources whose weights are averaged, as a baseline."""

    folder: str | None = None
    """Below the storage root; the model lies in it. None where there is nothing to average."""
    sources: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """The other sources, and why their weights cannot be averaged with the target's."""


@dataclass(frozen=True)
class Layout:
    """The folders of one recipe's run."""

    store: Store
    corpus: DataSet
    held_out: DataSet
    captured: dict[str, DataSet]
    """By source."""
    aligned: dict[str, DataSet]
    """By source."""
    map_files: dict[str, str]
    """Stored vocabulary maps by source, for the methods that take long to make one."""
    runs: tuple[TrainRun, ...]
    evaluations: dict[str, str]
    """Result file by model name: sources, `target`, `clm`, `fused`, `ensemble`, `merged`."""
    corpus_rows: Segmentation
    held_out_rows: Segmentation
    corpus_inputs: tuple[InputFile, ...] = ()
    """The documents as they were when the folders were named by them."""
    held_out_inputs: tuple[InputFile, ...] = ()
    token_nll: dict[str, DataSet] = field(default_factory=dict[str, DataSet])
    """What each source of the ensemble pays for the held-out rows, token by token."""
    merge: Merge = Merge()
    task_scores: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """Result file by model and task."""
    task_costs: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """By source of the ensemble and task: what it pays for the answers, token by token."""

    def list_results(self) -> list[str]:
        """Return all files that evaluating makes for the report."""
        tasks = (file for files in self.task_scores.values() for file in files.values())
        return [*self.evaluations.values(), *tasks]

    def input_fingerprint(self) -> str:
        """Return a hash of everything that is reported on."""
        results = sorted(self.list_results())
        return fingerprint_of(evaluations=results, runs=[run.folder for run in self.runs])


def plan_layout(recipe: Recipe) -> Layout:
    """Return where a recipe's run lies. Reads model and document listings, never their content.

    Raises:
        ValueError: A model cannot be used, or documents cannot be found.
    """
    max_tokens = recipe.corpus.max_tokens
    target_files = check_model(recipe.target, max_tokens, role="target")
    source_files = {
        source.name: check_model(source, max_tokens, role=f"source {source.name}")
        for source in recipe.sources
    }
    for source in recipe.sources:
        try:
            check_pair(load_recipe_tokenizer(source), load_recipe_tokenizer(recipe.target))
        except ValueError as error:
            raise ValueError(f"source {source.name}: {error}") from error
    store = open_store(recipe.storage, recipe.storage_retry_seconds)
    inputs = _list_documents(recipe.corpus.documents, "corpus.documents")
    own = recipe.evaluate.documents
    held_out_inputs = inputs if own is None else _list_documents(own, "evaluate.documents")
    (corpus, corpus_rows), (held_out, held_out_rows) = _place_corpora(
        recipe, store, inputs, held_out_inputs
    )
    captured = {
        source.name: _place_captured(
            recipe, source, source_files[source.name], store, corpus_rows.fingerprint
        )
        for source in recipe.sources
    }
    target_tokenizer = load_recipe_tokenizer(recipe.target).content_hash
    aligned = {
        name: _place(
            store,
            "aligned",
            name,
            of=data.fingerprint,
            target=target_tokenizer,
            method=first_name(recipe.align.method),
            rules=ALIGN_RULES,
        )
        for name, data in captured.items()
    }
    map_files = _place_maps(recipe, corpus)
    runs = _place_runs(recipe, target_files, corpus, aligned)
    scored: dict[str, Any] = {
        source.name: [source_files[source.name].identity, source.dtype] for source in recipe.sources
    }
    ensemble = [name for name in scored if recipe.fuse.weights.get(name, 1.0) > 0]
    scored["target"] = [target_files.identity, recipe.target.dtype]
    scored |= {run.name: run.fingerprint for run in runs}
    if len(ensemble) > 1:
        scored["ensemble"] = sorted(scored[name] for name in ensemble)
    merge = _plan_merge(recipe, target_files, source_files)
    if merge.folder is not None:
        scored["merged"] = [merge.folder, recipe.target.dtype]
    fingerprints = {
        name: fingerprint_of(model=model, text=held_out.fingerprint)
        for name, model in scored.items()
    }
    evaluations = {name: f"evaluate/{name}-{each}.json" for name, each in fingerprints.items()}
    token_nll = {
        name: DataSet(store, "evaluate", f"tokens-{name}", fingerprints[name])
        for name in ensemble
        if "ensemble" in scored
    }
    return Layout(
        store,
        corpus,
        held_out,
        captured,
        aligned,
        map_files,
        runs,
        evaluations,
        corpus_rows,
        held_out_rows,
        tuple(chain.from_iterable(inputs)),
        tuple(chain.from_iterable(held_out_inputs)),
        token_nll,
        merge,
        *_place_tasks(recipe, scored, list(token_nll)),
    )


def _place(store: Store, stage: str, name: str, **parts: Any) -> DataSet:
    return DataSet(store, stage, name, fingerprint_of(**parts))


def _place_corpora(
    recipe: Recipe,
    store: Store,
    inputs: list[list[InputFile]],
    held_out_inputs: list[list[InputFile]],
) -> list[tuple[DataSet, Segmentation]]:
    share = recipe.evaluate.held_out_share if recipe.evaluate.documents is None else 0.0
    settings = {
        "max_tokens": recipe.corpus.max_tokens,
        "shard_tokens": recipe.corpus.shard_tokens,
        "max_document_bytes": recipe.corpus.max_document_bytes,
        "held_out_share": share,
    }
    models = (recipe.target, *recipe.sources)
    return [
        plan_segmentation(
            store,
            name,
            settings | {"inputs": _identify(files)},
            models,
            recut=recipe.corpus.recut,
        )
        for name, files in (("", inputs), ("held-out", held_out_inputs))
    ]


def _list_documents(documents: Documents, setting: str) -> list[list[InputFile]]:
    """Return the files of each entry of a `documents` setting; never none."""
    return [list_inputs(item, setting) for item in documents]


def _identify(inputs: list[list[InputFile]]) -> list[Any]:
    return [
        [
            files[0].settings.model_dump(mode="json"),
            [[file.path, file.num_bytes, file.version] for file in files],
        ]
        for files in inputs
    ]


def _place_captured(
    recipe: Recipe, source: SourceSettings, files: ModelFiles, store: Store, rows: str
) -> DataSet:
    return _place(
        store,
        "captured",
        source.name,
        rows=rows,
        model=files.identity,
        dtype=source.dtype,
        backend=source.backend,
        tokenizer=load_recipe_tokenizer(source).content_hash,
        top_k=recipe.capture.kept_entries,
        draws=recipe.capture.num_draws,
    )


def _place_maps(recipe: Recipe, corpus: DataSet) -> dict[str, str]:
    """Name the stored vocabulary maps: by the pair of tokenizers, and the corpus if it counts."""
    method = recipe.align.method
    stored_map = METHODS[method].stored_map
    if stored_map is None:
        return {}
    text = corpus.fingerprint if stored_map == "per_corpus" else None
    target = load_recipe_tokenizer(recipe.target).content_hash
    names: dict[str, str] = {}
    for source in recipe.sources:
        pair = [load_recipe_tokenizer(source).content_hash, target]
        fingerprint = fingerprint_of(
            method=first_name(method), pair=pair, text=text, rules=ALIGN_RULES
        )
        names[source.name] = f"maps/{source.name}-{fingerprint}.parquet"
    return names


def _place_runs(
    recipe: Recipe, target: ModelFiles, corpus: DataSet, aligned: dict[str, DataSet]
) -> tuple[TrainRun, ...]:
    settings = recipe.train.model_dump(mode="json", by_alias=True)
    for speed_only in (
        *("chunk_positions", "max_failures", "checkpoint_every_steps", "keep_checkpoints"),
        *("validate_every_steps", "validation_rows", "trackers", "baseline"),
        # How rows are dealt and laid out changes rounding alone.
        *("num_workers", "min_workers", "pack", "sequence_tokens", "micro_batch_sequences"),
        *("gpus_per_worker", "cpus_per_worker", "accelerator_type", "placement"),
        "gradient_checkpointing",
    ):
        del settings[speed_only]
    common = {
        "corpus": corpus.fingerprint,
        "target": [target.identity, recipe.target.dtype],
        "seed": recipe.seed,
    }
    fused = fingerprint_of(
        **common,
        train=settings,
        aligned=[data.fingerprint for data in aligned.values()],
        fuse=recipe.fuse.model_dump(mode="json"),
    )
    runs = [TrainRun("fused", f"train/fused-{fused}", fused, recipe.train.is_fused)]
    if recipe.train.baseline:
        for of_fusion in ("lambda", "divergence", "skew", "temperature"):
            del settings[of_fusion]
        clm = fingerprint_of(**common, train=settings)
        runs.append(TrainRun("clm", f"train/clm-{clm}", clm, False))
    return tuple(runs)


def _plan_merge(recipe: Recipe, target: ModelFiles, source_files: dict[str, ModelFiles]) -> Merge:
    """Return which sources can be averaged with the target: same tensors, same tokens."""
    left_out: dict[str, str] = {}
    for source in recipe.sources:
        files = source_files[source.name]
        hashes = {load_recipe_tokenizer(each).content_hash for each in (source, recipe.target)}
        difference = find_difference(target, files)
        if files.identity == target.identity:
            left_out[source.name] = "it is the target itself"
        elif difference is not None:
            left_out[source.name] = difference
        elif len(hashes) > 1:
            left_out[source.name] = "its tokenizer is not the target's"
    names = tuple(source.name for source in recipe.sources if source.name not in left_out)
    if not names:
        return Merge(left_out=left_out)
    models = sorted(source_files[name].identity for name in names)
    fingerprint = fingerprint_of(first=target.identity, others=models)
    return Merge(f"evaluate/merged-model-{fingerprint}", names, left_out)


def _place_tasks(
    recipe: Recipe, models: dict[str, Any], ensemble: list[str]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Name the files of scores at tasks, and of what the ensemble's sources pay for answers."""
    tasks = recipe.evaluate.tasks
    if tasks is None:
        return {}, {}
    rules = describe_tasks(tasks)
    stems = {
        name: {
            task: f"evaluate/task-{name}-{task}-{fingerprint_of(model=model, task=task, **rules)}"
            for task in tasks.names
        }
        for name, model in models.items()
    }
    scores, costs = (
        {name: {task: stem + ending for task, stem in stems[name].items()} for name in names}
        for names, ending in ((list(stems), ".json"), (ensemble, ".parquet"))
    )
    return scores, costs


def describe_model(recipe: Recipe, name: str, layout: Layout) -> ModelSettings:
    """Return the settings of a model by its name in tables.

    Raises:
        KeyError: There is no model of this name.
    """
    if name == "target":
        return recipe.target
    for source in recipe.sources:
        if source.name == name:
            return source
    folder = find_own_folder(name, layout)
    if folder is None:
        raise KeyError(name)
    return recipe.target.model_copy(
        update={"model": f"{layout.store.root}/{folder}", "revision": None}
    )


def find_own_folder(name: str, layout: Layout) -> str | None:
    """Return where a model of this run's making lies below the storage root; None for others."""
    if name == "merged" and layout.merge.folder is not None:
        return f"{layout.merge.folder}/model"
    run = next((run for run in layout.runs if run.name == name), None)
    return None if run is None else f"{run.folder}/model"
