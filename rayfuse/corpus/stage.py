"""The corpus stage: Ray Data reads documents, cuts them into rows and commits shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
import ray

from rayfuse.corpus.documents import Document, InputFile, list_inputs, read_documents
from rayfuse.corpus.shards import (
    BYTES_PER_TOKEN,
    DocumentBatch,
    Part,
    batch_documents,
    build_rows,
    group_inputs,
    has_one_shard,
)
from rayfuse.layout import Layout
from rayfuse.model_files import load_recipe_tokenizer
from rayfuse.progress import Progress
from rayfuse.recipe import CorpusSettings, Documents, ModelSettings, Recipe, dump_recipe
from rayfuse.schema import flatten_column
from rayfuse.storage.dataset import Commit, DataSet


@dataclass(frozen=True)
class CutTask:
    """All that a worker needs to cut one group of files."""

    data: DataSet
    settings: CorpusSettings
    target: ModelSettings
    models: tuple[ModelSettings, ...]
    part: Part
    groups: list[list[InputFile]]

    def batches(self, group: int) -> Iterator[DocumentBatch]:
        """Read a group's documents, shard by shard."""
        documents: Iterator[Document] = chain.from_iterable(
            read_documents(file) for file in self.groups[group]
        )
        return batch_documents(
            documents,
            self.part,
            shard_bytes=self.settings.shard_tokens * BYTES_PER_TOKEN,
            max_document_bytes=self.settings.max_document_bytes,
        )


def build_corpora(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Make the corpus and the held-out rows; what is committed already stays.

    Raises:
        ValueError: There is not one usable document.
    """
    own = recipe.evaluate.documents
    share = recipe.evaluate.held_out_share if own is None else 0.0
    corpus = recipe.corpus.documents
    build_corpus(recipe, layout.corpus, corpus, Part(share, False), progress, "corpus")
    build_corpus(recipe, layout.held_out, own or corpus, Part(share, True), progress, "held-out")


def build_corpus(
    recipe: Recipe,
    data: DataSet,
    documents: Documents,
    part: Part,
    progress: Progress,
    title: str,
) -> None:
    """Make one data set of rows from documents.

    Raises:
        ValueError: There is not one usable document.
    """
    if data.is_whole():
        _check_not_empty(data, title)
        return
    data.claim({"recipe": dump_recipe(recipe)})
    data.drop_lost_shards()
    files = [file for item in documents for file in list_inputs(item, f"{title} documents")]
    groups = group_inputs(files, recipe.corpus.shard_tokens * BYTES_PER_TOKEN)
    models = (recipe.target, *recipe.sources)
    task = CutTask(data, recipe.corpus, recipe.target, models, part, groups)
    counts = _count_shards(task)
    starts = [sum(counts[:group]) for group in range(len(groups))]
    committed = data.list_committed()
    todo = [
        {"group": group, "start": start}
        for group, (start, count) in enumerate(zip(starts, counts, strict=True))
        if not committed.issuperset(range(start, start + count))
    ]
    done = len(committed)
    if todo:
        shards = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            partial(_cut_groups, task=task), batch_size=1, batch_format="pyarrow"
        )
        progress(f"{title}: cut into rows", done, sum(counts), "shards")
        for _ in shards.iter_rows():
            done += 1
            progress(f"{title}: cut into rows", done, sum(counts), "shards")
    data.finish(sum(counts))
    _check_not_empty(data, title)


def _count_shards(task: CutTask) -> list[int]:
    """Return how many shards each group makes; only groups that may make several are read."""
    shard_bytes = task.settings.shard_tokens * BYTES_PER_TOKEN
    counts = [1] * len(task.groups)
    unknown = [
        {"group": index}
        for index, group in enumerate(task.groups)
        if not has_one_shard(group, shard_bytes)
    ]
    if unknown:
        found = ray.data.from_items(unknown, override_num_blocks=len(unknown)).map_batches(
            partial(_count_batches, task=task), batch_size=1, batch_format="pyarrow"
        )
        for row in found.iter_rows():
            counts[row["group"]] = row["count"]
    return counts


def _count_batches(batch: pa.Table, task: CutTask) -> pa.Table:
    groups: list[int] = batch["group"].to_pylist()
    counts = [sum(1 for _ in task.batches(group)) for group in groups]
    return pa.table({"group": groups, "count": counts})


def _cut_groups(batch: pa.Table, task: CutTask) -> Iterator[pa.Table]:
    """Cut and commit the shards of groups, and yield a row of numbers for each new one."""
    target = load_recipe_tokenizer(task.target)
    tokenizers = list(
        {
            tokenizer.content_hash: tokenizer
            for tokenizer in (load_recipe_tokenizer(model) for model in task.models)
        }.values()
    )
    committed = task.data.list_committed()
    for record in batch.to_pylist():
        for shard, documents in enumerate(task.batches(record["group"]), record["start"]):
            if shard in committed:
                continue
            rows = build_rows(
                documents.documents, target, tokenizers, max_tokens=task.settings.max_tokens
            )
            yield _numbers_of(_commit_rows(task.data, shard, rows, documents))


def _commit_rows(data: DataSet, shard: int, rows: pa.Table, batch: DocumentBatch) -> Commit:
    tokens = len(flatten_column(rows, "target_ids")[0])
    return data.write_shard(
        shard,
        rows,
        tokens=tokens,
        rejects=batch.rejects,
        stats={
            "documents": float(len(batch.documents)),
            "bytes": float(sum(rows["num_bytes"].to_pylist())),
        },
    )


def _numbers_of(commit: Commit) -> pa.Table:
    numbers: dict[str, Any] = {"shard": commit.shard, "rows": commit.rows, "tokens": commit.tokens}
    return pa.table({name: [value] for name, value in numbers.items()})


def _check_not_empty(data: DataSet, title: str) -> None:
    commits = data.commits().values()
    if any(commit.rows for commit in commits):
        return
    rejects = sum(commit.rejects for commit in commits)
    where = f"{data.store.root}/{data.folder}/rejects"
    raise ValueError(
        f"{title} documents hold no usable text: {rejects} documents rejected "
        f"(reasons in {where}); check the paths and the `text` setting"
    )
