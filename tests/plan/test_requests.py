"""The planned requests equal those that an S3 server counts."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.align.task import align_committed, plan_task
from rayfuse.capture.engines.load import load_recipe_engine
from rayfuse.capture.shard import ShardCapturer
from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.plan.estimate import (
    ALIGN_SHARD,
    CAPTURE_SHARD,
    CORPUS_SHARD,
    DATA_SET_PAGES,
    Requests,
    count_readers,
)
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.storage.store import open_store
from rayfuse.storage.todo import list_missing
from rayfuse.train.batches import Packing, StepPlan, iterate_steps
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer
from tests.s3 import FaultProxy
from tests.train.data import open_reader, write_data

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DATA_SET = Requests(puts=3.0, gets=3.0)
"""Once per data set, for any number of shards: PUT of run.json, records and manifest; HEAD of the
manifest (twice), GET of run.json."""


def write_recipe(folder: Path, storage: str) -> Recipe:
    save_model("gpt2", 300, folder / "model")
    save_tokenizer(byte_level_tokenizer(300), folder / "model", bos="<|end|>", eos="<|end|>")
    lines = (json.dumps({"text": SAMPLE[i % 4] * (2 + i % 3)}) + "\n" for i in range(60))
    (folder / "docs.jsonl").write_text("".join(lines))
    model = {"model": str(folder / "model")}
    return parse_recipe(
        {
            "storage": storage,
            "corpus": {
                "documents": str(folder / "docs.jsonl"),
                "max_tokens": 64,
                "shard_tokens": 300,
            },
            "target": model,
            "sources": [model | {"name": "a", "gpus": 0}],
        }
    )


def cut_corpus(recipe: Recipe, layout: Layout) -> int:
    """Commit the corpus' shards as the corpus stage's workers do, without Ray."""
    import pyarrow as pa

    from rayfuse.corpus.shards import Part, group_inputs
    from rayfuse.corpus.stage import SplitTask, _count_batches, _split_groups

    files = layout.corpus_documents.files
    task = SplitTask(
        layout.corpus,
        recipe.corpus,
        recipe.target,
        None,
        layout.corpus_documents.segmentation,
        Part(0.0, False),
        group_inputs(files, recipe.corpus.shard_tokens * 4),
    )
    layout.corpus.claim({})
    (count,) = _count_batches(pa.table({"group": [0]}), task)["count"].to_pylist()
    list(_split_groups(pa.table({"group": [0], "start": [0], "count": [count]}), task))
    layout.corpus.finish(count)
    return count


def count_requests(proxy: FaultProxy) -> Requests:
    """Count the requests since the last call by price class."""
    kinds = Counter("LIST" if "list-type=2" in path else method for method, path, _ in proxy.log)
    proxy.log.clear()
    assert set(kinds) <= {"PUT", "GET", "HEAD", "LIST"}
    return Requests(float(kinds["PUT"]), float(kinds["GET"] + kinds["HEAD"]), float(kinds["LIST"]))


def of_shards(per_shard: Requests, shards: int) -> tuple[float, float]:
    every = per_shard.times(shards)
    return every.puts + DATA_SET.puts, every.gets + DATA_SET.gets


def test_corpus_capture_alignment_and_training_make_the_requests_that_are_planned(
    s3_proxy, s3_root, tmp_path
):
    recipe = write_recipe(tmp_path, s3_root)
    layout = plan_layout(recipe, ALIGN_FACTS)
    count_requests(s3_proxy)
    shards = cut_corpus(recipe, layout)
    assert shards > 8
    found = count_requests(s3_proxy)
    assert (found.puts, found.gets) == of_shards(CORPUS_SHARD, shards)
    assert found.lists <= DATA_SET_PAGES

    source, data = recipe.sources[0], layout.captured["a"]
    data.claim({})
    assert list_missing(data, shards, print) == list(range(shards))
    capturer = ShardCapturer(
        load_recipe_engine(source, recipe.capture),
        source,
        layout.corpus,
        data,
    )
    numbers = [capturer.capture(shard) for shard in range(shards)]
    assert sum(shard.rejects for shard in numbers) == 0
    data.finish(shards)
    found = count_requests(s3_proxy)
    puts, gets = of_shards(CAPTURE_SHARD, shards)
    # Per data set: HEAD of the manifest, and the corpus' manifest and records.
    assert (found.puts, found.gets) == (puts, gets + 3)
    assert found.lists <= DATA_SET_PAGES + 1  # an empty folder is listed twice

    task = plan_task(recipe, layout, source)
    task.aligned.claim({})
    for shard in range(shards):
        assert not task.aligned.is_committed(shard)
        align_committed(task, shard)
    task.aligned.finish(shards)
    found = count_requests(s3_proxy)
    puts, gets = of_shards(ALIGN_SHARD, shards)
    # Per data set: manifest and records of the corpus and of the captured data.
    assert (found.puts, found.gets) == (puts, gets + 4)
    assert found.lists <= DATA_SET_PAGES


@pytest.mark.parametrize("workers", [1, 8])
def test_training_reads_each_shard_no_more_often_than_planned(workers, s3_proxy, s3_root, tmp_path):
    corpus, aligned = write_data(tmp_path, [[5, 7, 3, 4] * 3] * 16)
    store = open_store(s3_root)
    for file in tmp_path.rglob("*.*"):
        store.write(file.relative_to(tmp_path).as_posix(), file.read_bytes())
    corpus, *sources = (replace(data, store=store) for data in (corpus, *aligned.values()))
    s3_proxy.log.clear()
    for rank in range(workers):
        reader = open_reader(corpus, dict(zip("ab", sources, strict=True)))
        list(
            iterate_steps(
                reader, Packing(16, 2, True), StepPlan(3, 1, 32), rank=rank, num_workers=workers
            )
        )
    reads = sum("/data/" in path for _, path, _ in s3_proxy.log)
    once = 16 * 3
    assert once <= reads <= once * count_readers(workers)
    if workers == 1:
        assert reads == once * count_readers(1)
