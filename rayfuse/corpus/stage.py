"""The corpus stage: Ray Data reads documents, splits them into rows and commits shards."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy

from rayfuse.config.base import UserError
from rayfuse.config.corpus import CorpusSettings
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.corpus.documents import Document, read_documents
from rayfuse.corpus.shards import (
    BYTES_PER_TOKEN,
    DocumentBatch,
    Part,
    batch_documents,
    build_chat_rows,
    build_rows,
    group_inputs,
    has_one_shard,
)
from rayfuse.corpus.summary import (
    check_halves,
    check_has_text,
    check_held_out_share,
    check_rejects,
    count_documents,
    summarize,
)
from rayfuse.models.chat import load_chat_format
from rayfuse.models.config_file import read_context_tokens
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.run.inputs import InputFile, check_unchanged
from rayfuse.run.layout import Layout
from rayfuse.run.segmentation import Segmentation
from rayfuse.runtime.metrics import count_work
from rayfuse.runtime.progress import CorpusPart, Progress, ProgressEvent
from rayfuse.runtime.resources import limit_cpu_tasks
from rayfuse.schema import ANSWERS
from rayfuse.storage.chat_columns import has_answers, read_answers
from rayfuse.storage.codec import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import Commit

PARTS: tuple[CorpusPart, CorpusPart] = ("rows", "held-out")


@dataclass(frozen=True)
class SplitTask:
    """Everything a worker needs to split one group of files into rows."""

    data: DataSet
    settings: CorpusSettings
    target: ModelSettings
    target_context: int | None
    """The longest row that the target takes."""
    segmentation: Segmentation
    part: Part
    groups: list[list[InputFile]]

    @property
    def num_files(self) -> int:
        """The number of files of documents."""
        return sum(len(group) for group in self.groups)

    def batches(self, group: int) -> Iterator[DocumentBatch]:
        """Read a group's documents, shard by shard.

        Raises:
            UserError: A file is no longer the one that was listed.
        """
        files, most = self.groups[group], self.settings.max_document_bytes
        documents: Iterator[Document] = chain.from_iterable(
            read_documents(file, most) for file in files
        )
        for batch in batch_documents(
            documents,
            self.part,
            shard_bytes=self.settings.shard_tokens * BYTES_PER_TOKEN,
            max_document_bytes=most,
        ):
            if len(files) == 1:  # several make one shard, checked at the end of each
                check_unchanged(files[0])
            yield batch


def build_corpora(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Make the corpus and the held-out rows; what is committed already stays.

    Raises:
        UserError: There is not one usable document, too many are rejected, or a file is no longer
            what was listed.
    """
    share = recipe.evaluate.held_out_share if recipe.evaluate.documents is None else 0.0
    corpus, held_out = (
        SplitTask(
            data=data,
            settings=recipe.corpus,
            target=recipe.target,
            target_context=read_context_tokens(recipe.target),
            segmentation=documents.segmentation,
            part=Part(share, takes_held_out),
            groups=group_inputs(documents.files, recipe.corpus.shard_tokens * BYTES_PER_TOKEN),
        )
        for data, documents, takes_held_out in (
            (layout.corpus, layout.corpus_documents, False),
            (layout.held_out, layout.held_out_documents, True),
        )
    )
    num_shards = [
        commit_rows(recipe, task, progress, part)
        for task, part in zip((corpus, held_out), PARTS, strict=True)
    ]
    _check_documents(recipe, corpus, held_out)
    for task, count in zip((corpus, held_out), num_shards, strict=True):
        task.data.finish(count)


def _check_documents(recipe: Recipe, corpus: SplitTask, held_out: SplitTask) -> None:
    """Check that both data sets have rows, and that not too many documents were rejected.

    Raises:
        UserError: They have none, or too many were; or no held-out document can choose the weights
            (`train.publish: best`), or none is left to compare models on.
    """
    is_shared = recipe.evaluate.documents is None
    for tasks in [(corpus, held_out)] if is_shared else [(corpus,), (held_out,)]:
        data = [task.data for task in tasks]
        summary = summarize(data, tasks[0].num_files)
        check_has_text(data, summary)
        check_rejects(data, summary, recipe.corpus.max_rejected_share)
        if is_shared:
            for task, part in zip(tasks, PARTS, strict=True):
                num_rows = summarize([task.data], task.num_files).rows
                share = recipe.evaluate.held_out_share
                check_held_out_share(part, num_rows, summary.documents, share)
    if recipe.train.publish == "best":
        check_halves(held_out.data)


def commit_rows(recipe: Recipe, task: SplitTask, progress: Progress, part: CorpusPart) -> int:
    """Commit all shards of one data set of rows, and return their number.

    Raises:
        UserError: A file is no longer what was listed, or the tokenizers that the rows fit are not
            there.
    """
    data, groups = task.data, task.groups
    manifest = data.read_manifest()
    if manifest is not None and data.is_complete():
        return manifest.num_shards
    task.segmentation.check_tokenizers()
    data.claim({"recipe": dump_recipe(recipe)})
    data.drop_missing_shards()
    counts = _count_shards(task)
    starts = [sum(counts[:group]) for group in range(len(groups))]
    committed = data.list_committed()
    todo = [
        {"group": group, "start": start, "count": count}
        for group, (start, count) in enumerate(zip(starts, counts, strict=True))
        if not committed.issuperset(range(start, start + count))
    ]
    done = len(committed)
    if todo:
        shards = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            partial(_split_groups, task=task),
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(limit_cpu_tasks()),
        )
        progress(ProgressEvent("corpus", part, done, sum(counts), "shards"))
        for _ in shards.iter_rows():
            done += 1
            progress(ProgressEvent("corpus", part, done, sum(counts), "shards"))
    return sum(counts)


def _count_shards(task: SplitTask) -> list[int]:
    """Count the shards of each group; only groups that may make several are read."""
    shard_bytes = task.settings.shard_tokens * BYTES_PER_TOKEN
    counts = [1] * len(task.groups)
    unknown = [
        {"group": index}
        for index, group in enumerate(task.groups)
        if not has_one_shard(group, shard_bytes)
    ]
    if unknown:
        found = ray.data.from_items(unknown, override_num_blocks=len(unknown)).map_batches(
            partial(_count_batches, task=task),
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(limit_cpu_tasks()),
        )
        for row in found.iter_rows():
            counts[row["group"]] = row["count"]
    return counts


def _count_batches(batch: pa.Table, task: SplitTask) -> pa.Table:
    groups: list[int] = batch["group"].to_pylist()
    counts = [sum(1 for _ in task.batches(group)) for group in groups]
    return pa.table({"group": groups, "count": counts})


def _split_groups(batch: pa.Table, task: SplitTask) -> Iterator[pa.Table]:
    """Cut and commit the shards of groups, and yield a row of numbers for each new one."""
    build = _prepare_chat(task) if task.settings.is_chat else _prepare_text(task)
    for record in batch.to_pylist():
        start, stop, began = record["start"], record["start"] + record["count"], time.monotonic()
        for shard, documents in enumerate(task.batches(record["group"]), start):
            if shard >= stop:  # the next group's number: its documents would be lost
                raise UserError(
                    f"documents {task.groups[record['group']][0].path} make more shards than the "
                    f"{stop - start} that were counted; they have changed: start again"
                )
            if task.data.is_committed(shard):
                continue
            rows = build(documents)
            _check_lengths(rows, task)
            commit = _commit_rows(task.data, shard, rows, documents)
            seconds, began = time.monotonic() - began, time.monotonic()
            name = task.data.name or "corpus"
            count_work("corpus", name, rows=commit.rows, tokens=commit.tokens, seconds=seconds)
            yield _numbers_of(commit)


def _prepare_text(task: SplitTask) -> Callable[[DocumentBatch], pa.Table]:
    """Load the tokenizers for dividing batches of texts into rows."""
    target = load_recipe_tokenizer(task.target)
    tokenizers = [load_recipe_tokenizer(model) for model in task.segmentation.split_for]
    most = task.settings.max_tokens
    return lambda batch: build_rows(batch.documents, target, tokenizers, max_tokens=most)


def _prepare_chat(task: SplitTask) -> Callable[[DocumentBatch], pa.Table]:
    """Load the chat templates for dividing batches of conversations into rows.

    Conversations that a template cannot represent are moved to the batch's rejects.
    """
    target = load_chat_format(task.target)
    formats = [load_chat_format(model) for model in task.segmentation.split_for]

    def build(batch: DocumentBatch) -> pa.Table:
        rows, batch.documents, rejects = build_chat_rows(
            batch.documents, target, formats, max_tokens=task.settings.max_tokens
        )
        batch.rejects += rejects
        return rows

    return build


def _check_lengths(rows: pa.Table, task: SplitTask) -> None:
    """Raise ValueError if the target cannot take a row; only one that came later has such."""
    lengths = np.diff(flatten_column(rows, "target_ids")[1])
    if task.target_context is not None and lengths.max(initial=0) > task.target_context:
        longest = int(lengths.argmax())
        raise UserError(
            f"row {rows['row_id'][longest].as_py()!r}, split for other tokenizers, is "
            f"{lengths[longest]} tokens of the target {task.target.model!r}, which takes "
            f"{task.target_context}; set corpus.resplit: true, which captures every source again"
        )


def _commit_rows(data: DataSet, shard: int, rows: pa.Table, batch: DocumentBatch) -> Commit:
    tokens = len(flatten_column(rows, "target_ids")[0])
    counts = {ANSWERS.name: float(len(read_answers(rows)[0]))} if has_answers(rows) else {}
    return data.write_shard(
        shard,
        rows,
        tokens=tokens,
        rejects=batch.rejects,
        stats=count_documents(
            len(batch.documents), sum(rows["num_bytes"].to_pylist()), batch.rejects
        )
        | counts,
    )


def _numbers_of(commit: Commit) -> pa.Table:
    numbers: dict[str, Any] = {"shard": commit.shard, "rows": commit.rows, "tokens": commit.tokens}
    return pa.table({name: [value] for name, value in numbers.items()})
