"""The corpus stage in this process: when it is complete, and what stops it before."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.base import UserError
from rayfuse.config.load import read_recipe
from rayfuse.corpus import stage
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.runtime.progress import report_nothing
from tests.small_run import write_recipe


class LocalData:
    """Does what Ray Data does with a few items, in this process."""

    def __init__(self, items: list[dict[str, int]], **options: Any) -> None:
        self.items = items

    def map_batches(self, function: Callable[[pa.Table], Any], **options: Any) -> "LocalData":
        self.function = function
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for item in self.items:
            found = self.function(pa.Table.from_pylist([item]))
            for table in [found] if isinstance(found, pa.Table) else found:
                yield from table.to_pylist()


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    local = SimpleNamespace(data=SimpleNamespace(from_items=LocalData))
    monkeypatch.setattr(stage, "ray", local)
    monkeypatch.setattr(stage, "limit_cpu_tasks", lambda: 1)
    path = write_recipe(tmp_path)
    (tmp_path / "docs").mkdir()
    lines = [json.dumps({"text": f"document {i} of some text"}) for i in range(100)]
    (tmp_path / "docs/a.jsonl").write_text("\n".join(lines))
    return path


def build(recipe: Path, *settings: str) -> Layout:
    documents = f"corpus.documents={recipe.parent}/docs"
    read = read_recipe(recipe, [documents, *settings])
    layout = plan_layout(read, ALIGN_FACTS)
    stage.build_corpora(read, layout, report_nothing)
    return layout


def is_complete(recipe: Path) -> bool:
    return bool(list(recipe.parent.glob("storage/corpus/*/manifest.json")))


def test_a_file_that_cannot_be_read_stops_the_stage_until_a_higher_share_allows_it(recipe):
    (recipe.parent / "docs/b.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(
        UserError, match=r"1 of 2 files of documents cannot be read, .* b.jsonl.zst"
    ):
        build(recipe)
    assert not is_complete(recipe)
    layout = build(recipe, "corpus.max_rejected_share=0.5")
    assert layout.corpus.is_complete()
    assert layout.held_out.is_complete()
    rows = [data.commits().values() for data in (layout.corpus, layout.held_out)]
    assert sum(commit.stats["documents"] for commits in rows for commit in commits) == 100


def test_weights_are_chosen_only_where_both_halves_have_documents(recipe):
    text = "".join(f'{{"id": "d{i}", "text": "a b c"}}\n' for i in range(40))
    (recipe.parent / "docs/a.jsonl").write_text(text)
    held_out = recipe.parent / "held_out.jsonl"
    held_out.write_text('{"id": "only", "text": "a b c"}\n')
    settings = (f"evaluate.documents={held_out}", "train.publish=best")
    with pytest.raises(UserError, match=r"publish is best.* one half has none of the 1; hold out"):
        build(recipe, *settings)
    assert not is_complete(recipe)
    held_out.write_text("".join(f'{{"id": "{i}", "text": "a b c"}}\n' for i in range(40)))
    build(recipe, *settings)
    assert is_complete(recipe)


@pytest.mark.parametrize(
    ("lines", "setting", "message"),
    [
        (b"[]\n", "corpus.max_rejected_share=1", r"no usable text: 1 documents rejected"),
        (b'{"text": "a b"}\n', "evaluate.held_out_share=0.02", r"none of the 1 documents"),
    ],
)
def test_a_data_set_without_rows_is_never_complete(lines, setting, message, recipe):
    (recipe.parent / "docs/a.jsonl").write_bytes(lines)
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            build(recipe, setting)
        assert not is_complete(recipe)
