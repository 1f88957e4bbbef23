"""Capture stops between shards when it is to, and resumes with the same result."""

import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from rayfuse.align.task import plan_align_step
from rayfuse.capture import stage
from rayfuse.capture.engines.base import Engine, TokenRows
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.stage import capture_sources
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import dump_recipe
from rayfuse.corpus.stage import build_corpora
from rayfuse.pipeline import prepare_run
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import ProgressEvent, StoppedEarly, report_nothing
from rayfuse.storage.dataset import DataSet
from tests.capture.test_cluster_faults import folder, models, write_recipe

pytestmark = pytest.mark.ray

__all__ = ["folder", "models"]  # fixtures


class SlowEngine:
    """Takes a second for a shard."""

    def __init__(self, inner: TransformersEngine) -> None:
        self.inner = inner

    @property
    def batch_tokens(self) -> int:
        return self.inner.batch_tokens

    def score_rows(self, rows: TokenRows):
        time.sleep(1.0)
        return self.inner.score_rows(rows)


def load_slow_engine(source: ModelSettings, settings: CaptureSettings) -> Engine:
    return SlowEngine(TransformersEngine(source, settings))


def load_at_gate(source: ModelSettings, settings: CaptureSettings, *, gate: Path) -> Engine:
    while not gate.exists():
        time.sleep(0.1)
    return TransformersEngine(source, settings)


class GatedEngine(SlowEngine):
    """Scores one shard at once, and the others once a file exists."""

    def __init__(self, inner: TransformersEngine, gate: Path) -> None:
        super().__init__(inner)
        self.gate, self.has_scored = gate, False

    def score_rows(self, rows: TokenRows):
        while self.has_scored and not self.gate.exists():
            time.sleep(0.1)
        self.has_scored = True
        return self.inner.score_rows(rows)


def load_gated_engine(source: ModelSettings, settings: CaptureSettings, *, gate: Path) -> Engine:
    return GatedEngine(TransformersEngine(source, settings), gate)


def read_data(data: DataSet) -> dict[int, bytes]:
    return {shard: data.read_file(commit) for shard, commit in data.commits().items()}


def prepare(models: Path, folder: Path):
    for number in range(5):  # four shards each
        shutil.copyfile(folder / "docs.jsonl", folder / f"docs-{number}.jsonl")
    values = dump_recipe(write_recipe(models, folder, "sound", shard_tokens=200))
    values["corpus"]["documents"] = str(folder / "docs-*.jsonl")
    recipe = parse_recipe(values)
    layout = prepare_run(recipe)
    build_corpora(recipe, layout, report_nothing)
    return recipe, layout


def list_files(layout: Layout) -> list[str]:
    data = layout.captured["sound"]
    return sorted(f"data/{name}" for name in data.store.sizes(f"{data.folder}/data"))


def test_capture_stops_between_shards_and_resumes_with_the_same_shards(models, folder, ray_cluster):
    recipe, layout = prepare(models, folder)
    data = layout.captured["sound"]
    done: list[int] = []

    def record(event: ProgressEvent) -> None:
        done.append(event.done)

    with pytest.raises(StoppedEarly):
        capture_sources(
            recipe,
            layout,
            record,
            load_slow_engine,
            then=plan_align_step,
            should_stop=lambda: max(done, default=0) > 0,
        )
    num_shards = len(layout.corpus.commits())
    first = read_data(data)
    assert 0 < len(first) < num_shards
    assert list_files(layout) == sorted(commit.file for commit in data.commits().values())
    assert not data.is_complete()
    capture_sources(recipe, layout, report_nothing, then=plan_align_step)
    assert data.is_complete()
    assert layout.aligned["sound"].is_complete()
    after = read_data(data)
    assert {shard: after[shard] for shard in first} == first  # none was made again


def test_an_interrupt_ends_capture_also_where_the_process_lives_on(models, folder, ray_cluster):
    recipe, layout = prepare(models, folder)
    done: list[int] = []

    def interrupt_after_a_shard() -> bool:
        if max(done, default=0) > 0:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        capture_sources(
            recipe,
            layout,
            lambda event: done.append(event.done),
            partial(load_gated_engine, gate=folder / "gate"),
            then=plan_align_step,
            should_stop=interrupt_after_a_shard,
        )
    (folder / "gate").touch()
    streams = [thread for thread in threading.enumerate() if thread.name == "capture sound"]
    for stream in streams:
        stream.join(timeout=60)
        assert not stream.is_alive()
    data = layout.captured["sound"]
    assert 0 < len(data.commits()) < len(layout.corpus.commits())
    capture_sources(recipe, layout, report_nothing, then=plan_align_step)
    assert data.is_complete()


def test_a_source_without_an_actor_does_not_keep_capture_from_stopping(
    models, folder, ray_cluster, monkeypatch
):
    monkeypatch.setattr(stage, "ALIGN_SECONDS", 1.0)
    recipe, layout = prepare(models, folder)
    began = time.monotonic()
    with pytest.raises(StoppedEarly):
        capture_sources(
            recipe,
            layout,
            report_nothing,
            partial(load_at_gate, gate=folder / "gate"),
            then=plan_align_step,
            should_stop=lambda: time.monotonic() - began > 2,
        )
    assert time.monotonic() - began < 60
    (folder / "gate").touch()  # the stream, which nothing waits for, ends without any shard
    (stream,) = [thread for thread in threading.enumerate() if thread.name == "capture sound"]
    stream.join(timeout=60)
    assert not stream.is_alive()
    assert layout.captured["sound"].list_committed() == set()
