"""Aligning what is stored: a shard that does not belong is named, with the row and position."""

from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.task import AlignTask, align_committed
from rayfuse.config.models import ModelSettings
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.storage.dataset import DataSet, ShardError
from rayfuse.storage.store import open_store
from tests.align.test_refusals import replace_ids
from tests.fakes import SAMPLE, byte_level_tokenizer, save_tokenizer, sentencepiece_tokenizer

TOP_K = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ModelSettings]:
    root = tmp_path_factory.mktemp("models")
    save_tokenizer(byte_level_tokenizer(300), root / "source", bos="<|end|>", eos="<|end|>")
    save_tokenizer(sentencepiece_tokenizer(330), root / "target", bos="<s>", eos="</s>")
    return {name: ModelSettings(model=str(root / name)) for name in ("source", "target")}


def make_tables(models: dict[str, ModelSettings]) -> dict[str, pa.Table]:
    source, target = (load_tokenizer(models[name].model) for name in ("source", "target"))
    corpus = make_corpus(SAMPLE, target, max_tokens=512)
    return {"corpus": corpus, "captured": make_captured(corpus, source, top_k=TOP_K)}


def store_shard_3(
    folder: Path,
    models: dict[str, ModelSettings],
    tables: dict[str, pa.Table],
    method: str = "bytes",
) -> AlignTask:
    store = open_store(str(folder))
    data = {name: DataSet(store, name, "a", "0") for name in ("corpus", "captured", "aligned")}
    for data_set in data.values():
        data_set.claim({})
    for name, table in tables.items():
        data[name].write_shard(3, table, tokens=1)
    return AlignTask(**models, **data, method=method, map_file=None)


def other_text(table: pa.Table) -> pa.Table:
    index = table.schema.get_field_index("text")
    return table.set_column(index, "text", pa.array(["another text", *SAMPLE[1:]]))


SPOILS = {
    "entry outside the vocabulary": (
        "captured",
        lambda table: replace_ids(table, "top_ids", 2, 3 * TOP_K + 1, 999),
        r"row 2, position 3: top_ids .*999.* vocabulary of 300",
    ),
    "token outside the vocabulary": (
        "captured",
        lambda table: replace_ids(table, "token_ids", 1, 5, -7),
        r"row 1, position 5: token -7 is outside the vocabulary of 300",
    ),
    "tokens of another text": (
        "captured",
        lambda table: replace_ids(table, "token_ids", 1, 5, 40),
        r"row 1: its tokens are not those of its text",
    ),
    "another text": ("corpus", other_text, r"row 0: its tokens are not those of its text"),
    "other rows": ("captured", lambda table: table.slice(1), r"hold different rows"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_captured_shard_that_does_not_belong_is_named(spoil, models, tmp_path):
    name, change, message = SPOILS[spoil]
    tables = make_tables(models)
    task = store_shard_3(tmp_path, models, tables | {name: change(tables[name])})
    place = rf"captured/a-0/data/00003-\w+\.parquet: .*{message}.*; remove it and capture"
    with pytest.raises(ShardError, match=place):
        align_committed(task, 3)
    assert not task.aligned.commits()


def test_a_shard_that_belongs_is_aligned(models, tmp_path):
    task = store_shard_3(tmp_path, models, make_tables(models))
    assert align_committed(task, 3).stats["with_signal"] > 0
    assert list(task.aligned.commits()) == [3]
