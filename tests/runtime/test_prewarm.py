"""When the sources' machines are asked for: before the corpus is cut, but not long before."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from rayfuse.pipeline import PREWARM_SECONDS, _prewarm_sources
from rayfuse.run.layout import plan_layout
from rayfuse.runtime import connect as session
from rayfuse.runtime import resources as machines
from rayfuse.runtime.progress import report_nothing
from tests.plan.test_plan import recipe_of, root

__all__ = ["root"]  # the fixture

CORPUS, HELD_OUT = "corpus: cut into rows", "held-out: cut into rows"


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What was asked for and let go of; the cluster may have four CPUs."""
    events: list[str] = []

    @contextmanager
    def prewarm_nodes(groups: Sequence[Sequence[dict[str, float]]]) -> Iterator[None]:
        events.append(f"asked for {groups}")
        yield
        events.append("let go")

    monkeypatch.setattr(session, "join_cluster", lambda: None)
    monkeypatch.setattr(machines, "prewarm_nodes", prewarm_nodes)
    monkeypatch.setattr(machines, "count_reachable", lambda resource: 4.0)
    monkeypatch.setattr(machines, "list_bundles", lambda source: [{"GPU": 1.0}])
    return events


def test_a_large_corpus_is_nearly_cut_first(root, tmp_path, asked, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    recipe = recipe_of(root, tmp_path, plan={"tokenise_bytes_per_core_second": 0.001})
    stages = ("corpus", "capture")
    with _prewarm_sources("corpus", stages, recipe, plan_layout(recipe), report_nothing) as watch:
        watch(CORPUS, 0, 1_000_000)
        clock[0] = 100.0
        watch(CORPUS, 1_000_000, 1_000_000)
        watch(HELD_OUT, 0, 1_000_000)
        clock[0] = 200.0
        watch(HELD_OUT, 1_000, 1_000_000)  # hours, by what was seen
        assert asked == []
        clock[0] = 90_100.0
        watch(HELD_OUT, 995_000, 1_000_000)  # minutes
        assert PREWARM_SECONDS > 5_000 * 90_000 / 995_000
        watch(HELD_OUT, 999_000, 1_000_000)
        assert asked == ["asked for [[{'GPU': 1.0}]]"]
    assert asked[1:] == ["let go"]


def test_a_small_one_is_not_waited_for(root, tmp_path, asked):
    recipe = recipe_of(root, tmp_path)
    stages = ("corpus", "capture")
    with _prewarm_sources("corpus", stages, recipe, plan_layout(recipe), report_nothing) as watch:
        assert len(asked) == 1
        watch(CORPUS, 0, 12)
        watch(HELD_OUT, 12, 12)
        assert len(asked) == 1


@pytest.mark.parametrize(("stage", "stages"), [("corpus", ("corpus",)), ("capture", ("capture",))])
def test_nothing_is_asked_for_what_does_not_come_next(stage, stages, root, tmp_path, asked):
    recipe = recipe_of(root, tmp_path)
    with _prewarm_sources(stage, stages, recipe, plan_layout(recipe), report_nothing) as watch:
        watch(CORPUS, 0, 12)
    assert asked == []
