"""When the sources' nodes are requested: before capture starts, but not long before."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from rayfuse import pipeline
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.pipeline import _prewarm_if_next
from rayfuse.run.layout import plan_layout
from rayfuse.runtime import prewarm, resources
from rayfuse.runtime.prewarm import PREWARM_SECONDS
from rayfuse.runtime.progress import CorpusPart, Progress, ProgressEvent, report_nothing
from tests.plan.test_plan import recipe_of, root

__all__ = ["root"]  # the fixture

STAGES = ("corpus", "capture")


@pytest.fixture
def requests(monkeypatch) -> list[str]:
    """The requests made and released; the cluster may have four CPUs."""
    events: list[str] = []

    @contextmanager
    def prewarm_nodes(groups: Sequence[Sequence[dict[str, float]]]) -> Iterator[None]:
        events.append(f"request {groups}")
        yield
        events.append("release")

    monkeypatch.setattr(pipeline, "join_cluster", lambda: None)
    monkeypatch.setattr(resources, "count_reachable", lambda resource: 4.0)
    monkeypatch.setattr(prewarm, "prewarm_nodes", prewarm_nodes)
    monkeypatch.setattr(prewarm, "list_bundles", lambda source: [{"GPU": 1.0}])
    return events


def report(progress: Progress, part: CorpusPart, done: int, total: int = 1_000_000) -> None:
    progress(ProgressEvent("corpus", part, done, total))


def test_a_large_corpus_requests_nodes_when_it_is_nearly_done(
    root, tmp_path, requests, monkeypatch
):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    recipe = recipe_of(root, tmp_path, plan={"tokenize_bytes_per_core_second": 0.001})
    layout = plan_layout(recipe, ALIGN_FACTS)
    with _prewarm_if_next("corpus", STAGES, recipe, layout, report_nothing) as progress:
        report(progress, "rows", 0)
        clock[0] = 100.0
        report(progress, "rows", 1_000_000)
        report(progress, "held-out", 0)
        clock[0] = 200.0
        report(progress, "held-out", 1_000)  # hours are left at this pace
        assert requests == []
        clock[0] = 90_100.0
        report(progress, "held-out", 995_000)  # minutes are left
        assert PREWARM_SECONDS > 5_000 * 90_000 / 995_000
        report(progress, "held-out", 999_000)
        assert requests == ["request [[{'GPU': 1.0}]]"]
    assert requests[1:] == ["release"]


def test_a_small_corpus_requests_nodes_at_once(root, tmp_path, requests):
    recipe = recipe_of(root, tmp_path)
    layout = plan_layout(recipe, ALIGN_FACTS)
    with _prewarm_if_next("corpus", STAGES, recipe, layout, report_nothing) as progress:
        assert len(requests) == 1
        report(progress, "rows", 0, 12)
        report(progress, "held-out", 12, 12)
        assert len(requests) == 1


@pytest.mark.parametrize(("stage", "stages"), [("corpus", ("corpus",)), ("capture", ("capture",))])
def test_nothing_is_requested_unless_capture_comes_next(stage, stages, root, tmp_path, requests):
    recipe = recipe_of(root, tmp_path)
    layout = plan_layout(recipe, ALIGN_FACTS)
    with _prewarm_if_next(stage, stages, recipe, layout, report_nothing) as progress:
        report(progress, "rows", 0, 12)
    assert requests == []
