"""The capture stage: for each source a Ray Data stream of shards through actors with its LLM.

One block is one shard: an actor reads the corpus shard, scores it, commits the captured shard;
a CPU task right behind it aligns it. Blocks carry shard numbers, never the data.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from rayfuse.align.task import AlignTask, align_committed, plan_task
from rayfuse.capture.engine import LoadEngine, load_transformers_engine
from rayfuse.capture.record import build_captured, tokenise_rows
from rayfuse.layout import Layout
from rayfuse.model_files import load_recipe_tokenizer
from rayfuse.progress import Progress
from rayfuse.recipe import CaptureSettings, Recipe, SourceSettings, dump_recipe
from rayfuse.storage.dataset import DataSet


class CaptureActor:
    """Holds one source LLM. Ray builds it once, then calls it per shard."""

    def __init__(
        self,
        source: SourceSettings,
        settings: CaptureSettings,
        corpus: DataSet,
        captured: DataSet,
        load_engine: LoadEngine,
    ) -> None:
        self.corpus, self.captured = corpus, captured
        self.tokenizer = load_recipe_tokenizer(source)
        self.engine = load_engine(source, settings)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Capture the shards that a batch names, and return their numbers."""
        commits = [self._capture(shard) for shard in batch["shard"].to_pylist()]
        tokens = [commit.tokens for commit in commits]
        return pa.table({"shard": [commit.shard for commit in commits], "tokens": tokens})

    def _capture(self, shard: int) -> Any:
        corpus = self.corpus.read_shard(self.corpus.read_commit(shard))
        rows = tokenise_rows(corpus, self.tokenizer)
        records = self.engine.score_rows(rows)
        table, rejects = build_captured(corpus, rows, records, self.tokenizer.eos_id)
        num_tokens = sum(len(row) for row in rows)
        return self.captured.write_shard(shard, table, tokens=num_tokens, rejects=rejects)


@dataclass(frozen=True)
class SourceWork:
    """What is left to do for one source."""

    source: SourceSettings
    shards: list[int]
    num_shards: int
    task: AlignTask


def capture_sources(
    recipe: Recipe,
    layout: Layout,
    progress: Progress,
    load_engine: LoadEngine = load_transformers_engine,
) -> None:
    """Capture and align what is missing of every source, all sources at once.

    Raises:
        ValueError: The corpus is not whole, or the cluster has no such GPU.
    """
    if not layout.corpus.is_whole():
        raise ValueError("the corpus is not whole; run `rayfuse corpus` first")
    work = [
        _plan_source(recipe, layout, source)
        for source in recipe.sources
        if not layout.captured[source.name].is_whole()
    ]
    with ThreadPoolExecutor(max_workers=max(len(work), 1)) as threads:
        futures = [
            threads.submit(_capture_source, each, recipe.capture, progress, load_engine)
            for each in work
        ]
    for future in futures:
        future.result()


def _plan_source(recipe: Recipe, layout: Layout, source: SourceSettings) -> SourceWork:
    captured, aligned = layout.captured[source.name], layout.aligned[source.name]
    captured.claim({"recipe": dump_recipe(recipe), "source": source.name})
    aligned.claim({"recipe": dump_recipe(recipe), "source": source.name})
    captured.drop_lost_shards()
    shards = sorted(layout.corpus.commits())
    todo = sorted(set(shards) - set(captured.commits()))
    task = plan_task(recipe, layout, source)
    return SourceWork(source, todo, len(shards), task)


def _capture_source(
    work: SourceWork, settings: CaptureSettings, progress: Progress, load_engine: LoadEngine
) -> None:
    source, task = work.source, work.task
    if work.shards:
        items = [{"shard": shard} for shard in work.shards]
        rows = (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(
                CaptureActor,
                fn_constructor_args=(source, settings, task.corpus, task.captured, load_engine),
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=source.min_actors, max_size=source.max_actors),
                num_cpus=source.cpus,
                **_gpu_options(source),
            )
            .map_batches(
                partial(_align_behind, task=task),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=0.5,
            )
        )
        done = work.num_shards - len(work.shards)
        progress(f"capture {source.name}", done, work.num_shards, "shards")
        for _ in rows.iter_rows():
            done += 1
            progress(f"capture {source.name}", done, work.num_shards, "shards")
    task.captured.finish(work.num_shards)
    if len(task.aligned.commits()) == work.num_shards:
        task.aligned.finish(work.num_shards)  # else shards captured before are left to `align`


def _align_behind(batch: pa.Table, task: AlignTask) -> pa.Table:
    """Align freshly captured shards; those aligned before, from equal rows, stay."""
    done = task.aligned.commits()
    for shard in batch["shard"].to_pylist():
        if shard not in done:
            align_committed(task, shard)
    return batch


def _gpu_options(source: SourceSettings) -> dict[str, Any]:
    """Return Ray's resource options; by default a whole GPU where there is any."""
    gpus = source.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    options: dict[str, Any] = {"num_gpus": gpus} if gpus else {}
    if source.accelerator_type is not None:
        options["accelerator_type"] = source.accelerator_type
    return options
