"""The metrics of a running capture, and the number of actors of each source."""

import json
import threading
import time
import urllib.request
from dataclasses import replace

import pyarrow as pa
import pytest
import ray

from rayfuse.align.task import plan_align_step
from rayfuse.capture import stats as stats_module
from rayfuse.capture.actor import CaptureActor
from rayfuse.capture.control import CaptureControl
from rayfuse.capture.engines.load import load_recipe_engine
from rayfuse.capture.scheduling import allocate_actors, plan_work
from rayfuse.capture.shard import ShardStats
from rayfuse.capture.stats import StatsAccumulator, to_line
from rayfuse.config.base import UserError
from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.pipeline import prepare_run, run_stages
from rayfuse.runtime.memory import NoRoomError
from rayfuse.runtime.progress import report_nothing
from rayfuse.runtime.resources import on_driver_node
from rayfuse.storage.seal import SEAL
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer

DONE = ShardStats(
    0,
    1000,
    10,
    0,
    True,
    "w",
    busy_seconds=3.0,
    idle_seconds=1.0,
    batch_tokens=64,
    storage_retries=0,
)


def test_shards_add_up_to_throughput_time_left_and_cost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stats_module.time, "monotonic", lambda: now[0])
    total = StatsAccumulator("s", 10, 2, batch_tokens=64, dollars_per_hour=3600.0, began=0.0)
    for shard in range(4):
        now[0] += 5.0
        total.add(
            replace(
                DONE,
                shard=shard,
                worker=f"w{shard % 2}",
                batch_tokens=64 >> (shard == 3),
                storage_retries=2 * shard - shard // 2,
            )
        )
    total.add(replace(DONE, shard=4, is_ours=False, rejects=1))
    found = total.compute_stats()
    assert (found.shards_done, found.shards_from_others, found.rejects) == (7, 1, 1)
    assert (found.tokens, found.workers, found.busy_share) == (4000, 2, 0.75)
    assert found.storage_retries == (4 - 1) + (6 - 1)  # the last of each worker
    assert found.tokens_per_second == pytest.approx(4000 / 20)
    assert found.tokens_per_second_per_worker == pytest.approx(100)
    assert found.seconds_left == pytest.approx(3 * 5.0)
    assert (found.dollars, found.dollars_left) == (pytest.approx(16.0), pytest.approx(12.0))
    line = found.describe(configured_batch_tokens=64)
    for words in ("200 tokens/s on 2", "busy 75%", "$16.00, $12.00 left", "1 shards by another"):
        assert words in line
    assert "1 rejected, 8 storage requests retried, out of memory: batches cut to 32 tokens" in line


def test_actors_are_divided_in_proportion_to_the_work_left():
    assert allocate_actors([8.0, 4.0], [1.0, 1.0], 6.0) == [4, 2]
    assert allocate_actors([8.0, 8.0], [1.0, 0.5], 3.0) == [2, 2]
    assert allocate_actors([1.0, 1.0], [1.0, 1.0], 1.0) == [1, 1]  # they take turns
    assert allocate_actors([0.0, 5.0], [1.0, 1.0], 4.0) == [1, 3]


@pytest.mark.ray
def test_a_capture_writes_metrics_jsonl_and_rays_metrics(tmp_path, ray_cluster):
    model = tmp_path / "model"
    save_model("llama", 320, model)
    save_tokenizer(byte_level_tokenizer(300), model, bos="<|end|>", eos="<|end|>")
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in SAMPLE * 10))
    (tmp_path / "held_out.txt").write_text(SAMPLE[0])
    source = {"model": str(model), "batch_tokens": 256, "dollars_per_hour": 2.5}
    recipe = parse_recipe(
        {
            "storage": str(tmp_path / "storage"),
            "corpus": {"documents": str(tmp_path / "docs.jsonl"), "shard_tokens": 100}
            | {"max_tokens": 256},
            "target": {"model": str(model)},
            "sources": [
                {"name": "one", "min_actors": 2, "max_actors": 3, **source},
                {"name": "two", **source},
            ],
            "evaluate": {"documents": str(tmp_path / "held_out.txt")},
        }
    )
    layout = prepare_run(recipe)
    run_stages(recipe, layout, ("corpus",), report_nothing, lambda _: None)
    total = ray.cluster_resources()["memory"]
    recipe = set_memory(recipe, "two", 0.3 * total / 2**30)
    (one, two), refused = plan_work(recipe, layout, report_nothing, plan_align_step)
    assert refused == []
    assert two.memory_bytes == pytest.approx(0.3 * total)
    assert 2**29 < one.memory_bytes < 2**30  # of a tiny model: what a process takes
    too_much = set_memory(recipe, "two", 2 * total / 2**30)
    with pytest.raises(UserError, match=r"sources.two.memory_gib is .*add a larger node, lower"):
        plan_work(too_much, layout, report_nothing, plan_align_step)
    values = dump_recipe(too_much)
    values["sources"][1]["required"] = False
    (work,), refused = plan_work(parse_recipe(values), layout, report_nothing, plan_align_step)
    assert work.source.name == "one"
    ((source, error),) = refused
    assert (source.name, type(error)) == ("two", NoRoomError)
    assert (one.max_actors, one.settings.batch_tokens) == (3, 256)
    assert 1 <= two.max_actors <= ray.cluster_resources()["CPU"]
    actor = ray.remote(CaptureActor).remote(
        one.source,
        one.settings,
        layout.corpus,
        layout.captured["one"],
        load_recipe_engine,
        ray.remote(**on_driver_node())(CaptureControl).remote(),
    )
    (numbers,) = ray.get(actor.__call__.remote(pa.table({"shard": [0]}))).to_pylist()
    wait_for_metrics("one", ["capture_tokens", "capture_busy_seconds", "capture_idle_seconds"])
    assert numbers["tokens"] > 0
    del actor
    free, ended = [total], threading.Event()

    def watch_memory() -> None:
        while not ended.wait(0.05):
            free.append(ray.available_resources().get("memory", 0.0))

    watch = threading.Thread(target=watch_memory)
    watch.start()
    run_stages(recipe, layout, ("capture",), report_nothing, lambda _: None)
    ended.set()
    watch.join()
    assert min(free) <= total - two.memory_bytes  # while its actor lived
    for name, data in layout.captured.items():
        last = json.loads(data.store.read(f"{data.folder}/metrics.jsonl").splitlines()[-1])
        commits = data.commits().values()
        assert (last["source"], last["shards_done"]) == (name, last["num_shards"])
        assert last["num_shards"] == len(commits)
        made = sum(commit.tokens for commit in commits)
        assert last["tokens"] == made - (numbers["tokens"] if name == "one" else 0)
        assert 0 < last["busy_share"] <= 1
        assert data.store.sizes(f"{data.folder}/workers") == {}  # reports end with the capture
        assert last["dollars"] > 0 == last["dollars_left"] == last["seconds_left"]
        assert set(last) - {SEAL} == set(to_line(StatsAccumulator(name, 1, 0, 1).compute_stats()))


def set_memory(recipe: Recipe, name: str, gib: float) -> Recipe:
    sources = [
        source.model_copy(update={"memory_gib": gib} if source.name == name else {})
        for source in recipe.sources
    ]
    return recipe.model_copy(update={"sources": tuple(sources)})


def wait_for_metrics(source: str, names: list[str]) -> None:
    """Wait until a node exports all metrics of a source, besides those of other captures."""
    port = ray.nodes()[0]["MetricsExportPort"]
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if f'source="{source}"' in line]
        if all(any(f"rayfuse_{name}" in line for line in lines) for name in names):
            return
        time.sleep(1)
    raise TimeoutError(f"Ray's metrics lack those of source {source}")
