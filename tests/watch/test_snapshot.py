"""The numbers are those of `rayfuse status`, at any size, and no file that is torn hides them."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

import rayfuse
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.capture.workers import WorkerState
from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.storage.rejects import Reject
from rayfuse.watch.snapshot import RunReader, Snapshot, to_values
from tests.stored_run import write_run
from tests.watch.conftest import move
from tests.watch.runs import (
    make_step,
    write_capture_log,
    write_many_shards,
    write_report,
    write_training,
)

NUM_SHARDS = 10_000


def read_all(reader: RunReader) -> Snapshot:
    """Read until no record is left."""
    until = time.monotonic() + 60
    snapshot = reader.read()
    while snapshot.unread and time.monotonic() < until:
        snapshot = reader.read()
    return snapshot


def check_equal(snapshot: Snapshot, status: dict[str, Any]) -> None:
    values = to_values(snapshot)
    assert values["stages"] == status["stages"]
    assert [*values["data_sets"]] == [*status["data_sets"]]
    for label, numbers in values["data_sets"].items():
        assert numbers == {key: status["data_sets"][label][key] for key in numbers}


def drop_shard(layout: Layout) -> None:
    """Make a captured data set incomplete: one shard lacks, one has a rejected row."""
    data = layout.captured["neox"]
    commit = data.read_commit(1)
    table = data.read_shard(commit)
    data.drop_shards([1, 2])
    reject = Reject("row", "out of memory: 3 tokens", num_documents=1)
    data.write_shard(1, table, tokens=7, rejects=[reject], inputs=commit.inputs)


def test_a_complete_and_an_incomplete_run_have_the_numbers_of_status(recipe: Recipe):
    reader = RunReader(recipe)
    run = rayfuse.open_run(recipe)
    check_equal(read_all(reader), run.status())
    drop_shard(reader.layout)
    snapshot = read_all(reader)
    check_equal(snapshot, run.status())
    neox = next(data for data in snapshot.data_sets if data.label == "capture neox")
    assert (neox.shards, neox.num_shards, neox.is_complete) == (3, 4, False)
    assert neox.rejects == {"out of memory: 3 tokens": 1}


def test_a_run_on_object_storage_has_the_numbers_of_status(s3_root: str, tmp_path: Path):
    recipe = write_run(tmp_path, storage=s3_root)
    reader = RunReader(recipe)
    drop_shard(reader.layout)
    check_equal(read_all(reader), rayfuse.open_run(recipe).status())


def test_ten_thousand_shards_are_counted_at_once_and_read_in_part(stored: Recipe, tmp_path: Path):
    sources = [
        source.model_dump(mode="json") | {"dollars_per_hour": 36.0} for source in stored.sources
    ]
    recipe = move(stored, str(tmp_path / "many"), sources=sources)
    reader = RunReader(recipe)
    write_many_shards(recipe, reader.layout, NUM_SHARDS)
    began = time.process_time()  # of this process: others run beside it
    first = reader.read()
    assert time.process_time() - began < 2
    assert first.unread
    found = {data.label: data for data in first.data_sets}
    assert (found["corpus"].shards, found["corpus"].is_complete) == (NUM_SHARDS, True)
    neox = found["capture neox"]
    assert (neox.shards, neox.num_shards, neox.is_complete) == (NUM_SHARDS - 1, NUM_SHARDS, False)
    last = read_all(reader)
    neox = next(data for data in last.data_sets if data.label == "capture neox")
    assert neox.tokens == 100_000 * (NUM_SHARDS - 1)
    assert len(neox.workers) == 64
    cost = next(cost for cost in last.costs if cost.source == "neox")
    assert cost.worker_seconds == pytest.approx(10 * (NUM_SHARDS - 1))
    assert cost.left_seconds == pytest.approx(10)
    assert (cost.dollars, cost.dollars_left) == pytest.approx((0.1 * (NUM_SHARDS - 1), 0.1))


def test_the_time_left_is_that_of_the_log(recipe: Recipe):
    reader = RunReader(recipe)
    drop_shard(reader.layout)
    write_capture_log(reader.layout.captured["neox"])
    snapshot = read_all(reader)
    capture = next(stage for stage in snapshot.stages if stage.stage == "capture")
    assert capture.seconds_left == pytest.approx(540, abs=10)
    assert (capture.done, capture.total) == (7, 8)
    assert snapshot.written_at is not None
    assert snapshot.read_at - snapshot.written_at == pytest.approx(60, abs=10)


def test_a_training_has_its_steps_its_workers_and_the_holder_of_its_lease(recipe: Recipe):
    reader = RunReader(recipe)
    write_training(reader.layout, 3)
    fused, clm = read_all(reader).trainings
    assert (fused.name, fused.steps, fused.tokens) == ("fused", 3, 3000)
    rows = sum(commit.rows for commit in reader.layout.corpus.commits().values())
    assert fused.num_steps == -(-rows // recipe.train.rows_per_step) * recipe.train.epochs
    assert fused.seconds_left == pytest.approx(2.0 * max(fused.num_steps - 3, 0))
    assert (fused.worker_seconds, clm.worker_seconds) == (12.0, 12.0)
    assert fused.holder == "process 77 on node-1"
    assert not fused.is_holder_silent
    assert [worker.gpus for worker in fused.workers] == [["5"]]
    assert fused.last("bits_per_byte") == 1.5
    assert clm.last("fusion_loss") is None


def test_a_training_that_was_resumed_from_an_older_step_forgets_the_later_ones(recipe: Recipe):
    reader = RunReader(recipe)
    write_training(reader.layout, 5)
    assert read_all(reader).trainings[0].steps == 5
    lines = [json.dumps(make_step(step, loss=9.0)) for step in (1, 2)]
    name = f"{reader.layout.runs[0].folder}/metrics.jsonl"
    reader.layout.store.write(name, "\n".join(lines).encode())
    run = reader.read().trainings[0]
    assert [(record["step"], record["loss"]) for record in run.records] == [(1, 9.0), (2, 9.0)]


def tear(layout: Layout) -> list[Path]:
    """Cut every kind of file that is read in the middle; return them."""
    data = layout.captured["neox"]
    drop_shard(layout)
    write_capture_log(data)
    write_report(data, WorkerState("node-1", 5, ["0"], time.time()))
    write_training(layout, 3)
    root, run = Path(layout.store.root), layout.runs[0].folder
    names = [
        *(f"{data.folder}/{name}" for name in ("commits/00000.json", "metrics.jsonl")),
        *(f"{data.folder}/{name}" for name in ("workers/job.json", "rejects/00001.jsonl")),
        *(f"{run}/{name}" for name in ("metrics.jsonl", "lease.json", "workers.json")),
        *(f"{layout.captured['gpt2'].folder}/{name}" for name in ("manifest.json",)),
        *(f"{layout.aligned['gpt2'].folder}/{name}" for name in ("manifest.json",)),
    ]
    return [root / name for name in names]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_torn_file_hides_nothing_else_and_is_read_again(recipe: Recipe, share: float):
    reader = RunReader(recipe)
    files = tear(reader.layout)
    complete = {file: file.read_bytes() for file in files}
    for file, content in complete.items():
        file.write_bytes(content[: int(share * len(content))])
    snapshot = reader.read()
    assert snapshot.unread == 0  # the others: a page does not hurry for files that are torn
    text = "\n".join(snapshot.faults)
    lines = ("metrics.jsonl", "lease.json")  # an empty log is a log; a lease names its holder
    for file in files:
        assert file.name in lines or str(file.parent.name) in text
    corpus = snapshot.data_sets[0]
    assert (corpus.label, corpus.is_complete, corpus.shards) == ("corpus", True, 4)
    for file, content in complete.items():
        file.write_bytes(content)
    healed = read_all(reader)
    assert healed.faults == []
    assert healed.trainings[0].steps == 3
    assert healed.data_sets[2].log[-1]["tokens_per_second"] == 1234.0


def test_a_corrupt_result_is_shown_in_every_read_until_it_is_repaired(recipe: Recipe):
    reader = RunReader(recipe)
    assert read_all(reader).faults == []
    name = next(iter(reader.layout.evaluation.list_files()))
    path = Path(reader.layout.store.root, name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'{"bits_per_byte": 1')
    reader.results_at = -math.inf  # the next check is due
    for _ in range(3):
        (fault,) = reader.read().faults
        assert path.name in fault
    path.unlink()
    reader.results_at = -math.inf
    assert reader.read().faults == []


def test_another_schema_version_is_refused_before_the_page_is_served(recipe: Recipe):
    reader = RunReader(recipe)
    path = Path(reader.layout.store.root, reader.layout.corpus.folder, "manifest.json")
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "schema_version": 4, "record_sha256": ""}))
    del record["record_sha256"]
    path.write_text(json.dumps(record | {"schema_version": 4}))
    with pytest.raises(UserError, match="has schema version 4"):
        reader.read()


def test_a_report_of_the_recipe_as_it_stands_is_current(recipe: Recipe):
    layout, watched = plan_layout(recipe, ALIGN_FACTS), RunReader(recipe).layout
    assert (watched.recipe, watched.input_fingerprint()) == (
        layout.recipe,
        layout.input_fingerprint(),
    )
