"""A corpus and a store of another tool -> the captured rows of a source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from rayfuse.capture.engines.base import Failure
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.stats import MIN_ROWS
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.base import UserError, first_line
from rayfuse.config.models import SourceSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.imports.convert import convert_row
from rayfuse.imports.store import (
    ForeignStore,
    Vocabulary,
    hash_tokens,
    list_vocabulary,
    open_foreign_store,
    strip_specials,
)
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.run.layout import Layout
from rayfuse.run.segmentation import write_segmentation
from rayfuse.runtime.progress import (
    Progress,
    ProgressEvent,
    ShouldStop,
    StoppedEarly,
    never_stop,
)
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.rejects import Reject
from rayfuse.storage.todo import list_missing

NOT_STORED = "its tokens are not in the imported store"

UNUSABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What decoding raises for a record that does not have the layout of the store."""


def open_source_store(source: SourceSettings) -> ForeignStore:
    """Open the store that a source is imported from.

    Raises:
        UserError: There is none, or its layout is unknown.
    """
    assert source.captured_from is not None, "only imported sources have a store"
    setting = f"sources.{source.name}.captured_from"
    return open_foreign_store(source.captured_from, source.captured_aligned, setting=setting)


def check_imports(recipe: Recipe, layout: Layout) -> None:
    """Check the stores of all imported sources; decodes no row.

    One that is imported completely may be missing or unreadable, but not another store.

    Raises:
        UserError: A store is missing, its layout is unknown, or it is not the one of which rows
            are imported already.
    """
    for source in recipe.sources:
        if source.captured_from is None:
            continue
        captured = layout.captured[source.name]
        try:
            store = open_source_store(source)
        except UserError:
            if captured.is_complete():
                continue
            raise
        check_unchanged(source, store, captured)


def describe_import(source: SourceSettings, store: ForeignStore) -> dict[str, Any]:
    """List what captured rows are imported from, as their run record has it."""
    return {
        "format": store.format.name,
        "identity": store.identity,
        "model": source.model,
        "revision": source.revision,
    }


def check_unchanged(source: SourceSettings, store: ForeignStore, captured: DataSet) -> None:
    """Check that rows that are imported already are of the same store and model.

    Raises:
        UserError: They are not.
    """
    try:
        imported = captured.read_run().get("imported", {})
    except FileNotFoundError:
        return  # none is imported
    expected = describe_import(source, store)
    if imported == expected:
        return
    names = [name for name, value in expected.items() if imported.get(name) != value]
    raise UserError(
        f"{store.setting} is {source.captured_from!r}, which has changed since rows of it were "
        f"imported ({', '.join(names)}); remove {captured.store.root}/{captured.folder} to import "
        "it again"
    )


def import_sources(
    recipe: Recipe, layout: Layout, progress: Progress, should_stop: ShouldStop = never_stop
) -> None:
    """Write what is missing of the captured rows of all imported sources.

    Args:
        recipe: The recipe.
        layout: Its run.
        progress: Receives an event after each shard.
        should_stop: Once it returns True, no further shard is started.

    Raises:
        StoppedEarly: It has stopped between shards, as it was to.
        UserError: The corpus is incomplete, a store is missing, has changed, or lacks too many
            rows of the corpus.
        ShardError: A shard of the corpus is corrupt.
    """
    for source in recipe.sources:
        if source.captured_from is not None and not layout.captured[source.name].is_complete():
            if should_stop():
                raise StoppedEarly
            _import_source(recipe, layout, source, progress, should_stop)


def _import_source(
    recipe: Recipe,
    layout: Layout,
    source: SourceSettings,
    progress: Progress,
    should_stop: ShouldStop,
) -> None:
    captured, manifest = layout.captured[source.name], layout.corpus.read_manifest()
    if manifest is None:
        raise UserError("the corpus is incomplete; run `rayfuse corpus` first")
    for rows in (layout.corpus_documents.segmentation, layout.held_out_documents.segmentation):
        write_segmentation(layout.store, rows)

    def note(text: str) -> None:
        progress(ProgressEvent("capture", source.name, note=text))

    importer = _open_importer(recipe, layout, source)
    store = importer.store
    note(f"imported: {store.format.name}, {store.num_rows:,} texts, {store.num_bytes:,} bytes")
    for lack in store.format.lacks:
        note(f"the store lacks {lack}")
    missing = set(list_missing(captured, manifest.num_shards, note))
    rows = rejects = 0
    for shard in range(manifest.num_shards):
        commit = layout.corpus.read_commit(shard)
        if shard in missing:
            table, rejected, stats, tokens = importer.import_rows(layout.corpus.read_shard(commit))
            done = captured.write_shard(
                shard,
                table,
                tokens=tokens,
                rejects=rejected,
                stats=stats,
                inputs={"corpus": commit.identity},
            )
        else:
            done = captured.read_commit(shard)
        rows, rejects = rows + done.rows, rejects + done.rejects
        _check_rejects(source, store, rows, rejects, recipe.capture.max_rejected_share)
        progress(ProgressEvent("capture", source.name, shard + 1, manifest.num_shards, "shards"))
        if shard in missing and shard + 1 < manifest.num_shards and should_stop():
            raise StoppedEarly
    captured.finish(manifest.num_shards)


def _open_importer(recipe: Recipe, layout: Layout, source: SourceSettings) -> "Importer":
    """Open and index a source's store, and claim its captured rows.

    Raises:
        UserError: The store is missing, or has changed since a part of it was imported.
    """
    captured = layout.captured[source.name]
    store = open_source_store(source)
    imported = describe_import(source, store)
    captured.claim({"recipe": dump_recipe(recipe), "source": source.name, "imported": imported})
    check_unchanged(source, store, captured)
    tokenizer = load_recipe_tokenizer(source)
    vocabulary = list_vocabulary(tokenizer)
    index = index_rows(store, vocabulary)
    return Importer(store, tokenizer, vocabulary, recipe.capture.kept_entries, index)


def _check_rejects(
    source: SourceSettings, store: ForeignStore, rows: int, rejects: int, max_share: float
) -> None:
    if rejects > max_share * max(rows, MIN_ROWS) or rejects == rows > 0:
        raise UserError(
            f"{store.setting} is {source.captured_from!r}, which lacks {rejects} of the first "
            f"{rows} rows of the corpus, more than capture.max_rejected_share ({max_share:.2%}); "
            "write its own texts by `rayfuse import` and use them as corpus.documents, raise "
            "corpus.max_tokens to the longest of them, and check that model has its tokenizer"
        )


def index_rows(store: ForeignStore, vocabulary: Vocabulary) -> dict[bytes, tuple[int, int]]:
    """Index the rows of a store by the tokens of their text: numbers of the file and of the row."""
    index: dict[bytes, tuple[int, int]] = {}
    for file, row, tokens in store.read_token_rows():
        first, stop, is_text = strip_specials(tokens, vocabulary)
        if is_text and stop > first:
            index.setdefault(hash_tokens(tokens[first:stop]), (file, row))
    return index


@dataclass(frozen=True)
class Importer:
    """Finds the rows of the corpus in a store, and converts what it has of them."""

    store: ForeignStore
    tokenizer: TextTokenizer
    vocabulary: Vocabulary
    top_k: int
    """Columns of a record: entries of a position beyond them join its tail."""
    index: Mapping[bytes, tuple[int, int]]

    def import_rows(self, corpus: pa.Table) -> tuple[pa.Table, list[Reject], dict[str, float], int]:
        """Build the CAPTURED rows of a shard, with rejects, counts and the number of tokens."""
        token_rows = tokenize_rows(corpus, self.tokenizer)
        ends: list[bool] = corpus["ends_document"].to_pylist()
        counts = {"unrecorded": 0.0, "estimated": 0.0}
        results = [
            self._import_row(row, end, counts) for row, end in zip(token_rows, ends, strict=True)
        ]
        table, rejects = build_captured(corpus, token_rows, results, self.tokenizer.eos_id)
        return table, rejects, counts, sum(map(len, token_rows))

    def _import_row(
        self, tokens: Int[np.ndarray, " _"], ends_document: bool, counts: dict[str, float]
    ) -> TopLogprobs | Failure:
        start = int(self.tokenizer.start_id is not None)
        stop = len(tokens) - int(ends_document and self.tokenizer.eos_id is not None)
        place = self.index.get(hash_tokens(tokens[start:stop]))
        if place is None:
            return Failure(NOT_STORED)
        try:
            own, stored = self.store.read_tokens(*place), self.store.read_row(*place)
            record = convert_row(stored, own, tokens, self.vocabulary, top_k=self.top_k)
        except UNUSABLE as error:
            path, row = self.store.files[place[0]].path, place[1]
            return Failure(f"row {row} of {path} cannot be used: {first_line(error)}")
        for name in counts:
            counts[name] += float(getattr(record, name))
        return record.top
