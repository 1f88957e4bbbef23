import numpy as np
import pytest

from rayfuse.report.spans import ShardSpan, read_spans, share_waited, sum_busy
from rayfuse.report.timeline import draw_timeline, find_pauses, skip_pauses
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import open_store
from tests.report.conftest import make_aligned
from tests.report.test_plots import width_of

NOON = 1_700_000_000.0


def make_spans(worker: str, start: float, number: int = 5) -> list[ShardSpan]:
    """Return shards of 8 s each, 2 s apart."""
    return [ShardSpan(worker, start + 2 + 10 * i, 8.0, 2.0, 1000) for i in range(number)]


def test_commits_record_the_worker_and_the_time_of_each_shard(tmp_path):
    data = DataSet(open_store(str(tmp_path)), "captured", "a", "0")
    data.claim({})
    for shard, began in enumerate((30.0, 10.0)):
        stats = {"began": began, "busy_seconds": 4.0, "idle_seconds": 1.0}
        table = make_aligned(range(2), [1.0, 2.0])
        data.write_shard(shard, table, tokens=7, stats=stats, worker=f"w{shard}")
    spans = read_spans(data)
    assert spans == [ShardSpan("w1", 10.0, 4.0, 1.0, 7), ShardSpan("w0", 30.0, 4.0, 1.0, 7)]
    assert sum_busy(spans) == 8.0
    assert share_waited(spans) == pytest.approx(0.2)


def test_a_night_between_two_jobs_is_skipped():
    night = 50_000.0
    spans = make_spans("a", NOON) + make_spans("b", NOON + 50 + night)
    pauses = find_pauses(spans)
    assert pauses == [(0.0, NOON), (NOON + 50, NOON + 50 + night)]
    times = np.array([NOON, NOON + 50, NOON + 1000, NOON + 50 + night, NOON + 60 + night])
    np.testing.assert_allclose(skip_pauses(times, pauses), [0, 50, 50, 50, 60], atol=1e-6)


def test_no_pause_where_one_worker_covers_for_another():
    spans = [
        ShardSpan("a", NOON, 500.0, 0.0, 1),
        *make_spans("b", NOON),
        *make_spans("b", NOON + 300),
    ]
    assert find_pauses(spans) == [(0.0, NOON)]


def test_many_workers_of_many_sources_are_drawn():
    spans = {
        f"source {source}": [
            span for i in range(30) for span in make_spans(f"w{i}", NOON + 3 * i, number=20)
        ]
        for source in range(2)
    }
    assert width_of(draw_timeline(spans | {"none": []})) == 1800
