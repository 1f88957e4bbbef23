"""The report shows the results that are in the store."""

import re
from dataclasses import replace

import numpy as np
import pytest

from rayfuse.config.recipe import Recipe
from rayfuse.report import gather
from rayfuse.report.gather import (
    SourceSelection,
    count_selected_rows,
    gather_findings,
    measure_signal,
    read_curve,
    read_evaluations,
    select_lowest_nll,
)
from rayfuse.run.layout import Layout
from rayfuse.run.made_models import find_faults, is_made
from rayfuse.storage.files import hash_bytes, write_record
from rayfuse.storage.seal import ShardError
from tests.report.conftest import make_aligned, make_data


def test_the_lowest_nll_is_selected_and_ties_go_to_the_first():
    nats = np.array([[1.0, 5.0, 4.0, np.inf, np.inf], [2.0, 4.0, 4.0, 9.0, np.nan]])
    found = select_lowest_nll(nats, np.full(5, 10))
    np.testing.assert_array_equal(found, [0, 1, 0, 1, -1])


def test_selected_rows_are_counted_by_domain(layout: Layout):
    counts = {"code": {"big": 1, "coder": 1}, "wiki": {"big": 1, "coder": 0}}
    assert count_selected_rows(layout.corpus, layout.aligned) == SourceSelection(counts, 1, 2, 2)


def test_a_large_run_is_counted_on_its_first_shards_and_says_so(layout: Layout, monkeypatch):
    monkeypatch.setattr(gather, "MAX_SHARDS", 1)
    found = count_selected_rows(layout.corpus, layout.aligned)
    assert (found.shards_read, found.num_shards) == (1, 2)
    assert sum(sum(row.values()) for row in found.counts.values()) == 2


def test_a_shard_of_other_rows_is_not_counted(layout: Layout):
    tables = [make_aligned(range(5, 7), [1.0, 1.0]), make_aligned(range(2, 4), [1.0, 1.0])]
    foreign = make_data(layout.store, "aligned", "foreign", tables)
    with pytest.raises(ShardError, match="shard 0 holds other rows than the corpus"):
        count_selected_rows(layout.corpus, {"foreign": foreign})


def test_signal_and_tail_are_means_over_all_shards(layout: Layout):
    found = measure_signal(layout.aligned["big"])
    assert (found.positions, found.with_signal, found.share) == (20, 16, 0.8)
    assert (found.tail_mass, found.captured_tail_mass) == (0.25, 0.125)


def test_a_source_without_signal_has_no_tail_rather_than_a_division_by_zero(layout: Layout):
    stats = {"positions": 0.0, "with_signal": 0.0, "tail_mass": 0.0}
    tables = [make_aligned(range(1), [1.0])]
    found = measure_signal(make_data(layout.store, "aligned", "mute", tables, stats=stats))
    assert (found.share, found.tail_mass, found.captured_tail_mass) == (0.0, 0.0, None)


def test_a_step_done_twice_counts_once_and_a_run_without_fusion_has_none(layout: Layout):
    fused, clm = (read_curve(layout.store, run) for run in layout.runs)
    assert fused is not None
    assert clm is not None
    np.testing.assert_array_equal(fused.steps, [1, 2, 3])
    np.testing.assert_array_equal(fused.tokens, [100, 200, 300])
    np.testing.assert_allclose(fused.clm_loss, [2.0, 1.0, 0.0])
    assert np.isnan(clm.fusion_loss).all()


def test_a_run_without_metrics_has_no_curve(layout: Layout):
    assert read_curve(layout.store, replace(layout.runs[0], folder="train/none")) is None
    layout.store.write("train/empty/metrics.jsonl", b"")
    done = {"metrics.jsonl": hash_bytes(b"")}
    write_record(layout.store, "train/empty/done.json", {"inputs": {}}, done)
    assert read_curve(layout.store, replace(layout.runs[0], folder="train/empty")) is None


@pytest.mark.parametrize("change", [lambda lines: lines[:-9], lambda lines: b"9" + lines[1:]])
def test_metrics_that_are_not_what_was_written_are_named(change, layout: Layout):
    run = layout.runs[0]
    file = f"{run.folder}/metrics.jsonl"
    layout.store.write(file, change(layout.store.read(file)))
    with pytest.raises(ShardError, match=re.escape(file)):
        read_curve(layout.store, run)


def test_a_model_of_other_rows_than_there_are_now_is_stale(layout: Layout):
    run = layout.runs[0]
    now = {"corpus": "new"}
    assert is_made(layout.store, run.folder, now)  # its inputs are not recorded
    files = {"metrics.jsonl": hash_bytes(layout.store.read(f"{run.folder}/metrics.jsonl"))}
    done = f"{run.folder}/done.json"
    write_record(layout.store, done, {"inputs": {"corpus": "old"}}, files)
    assert not is_made(layout.store, run.folder, now)
    layout.corpus.finish(2)
    ((name, reason),) = find_faults(layout, run)
    assert (name, reason.partition(":")[0]) == (done, "is stale")


def test_sources_come_first_and_fused_last(layout: Layout):
    assert list(read_evaluations(layout)) == [
        "big",
        "coder",
        "ensemble",
        "merged",
        "target",
        "clm",
        "fused",
    ]


def test_a_model_that_is_not_evaluated_is_named(layout: Layout):
    layout.store.remove(layout.evaluation.scores["clm"])
    with pytest.raises(ValueError, match="model clm is not evaluated; run `rayfuse evaluate`"):
        read_evaluations(layout)


def test_fused_is_compared_with_every_other_model(layout: Layout, recipe: Recipe):
    found = gather_findings(recipe, layout)
    assert set(found.differences) == {"big", "coder", "ensemble", "merged", "target", "clm"}
    assert found.differences["big"]["all"].difference > 0 > found.differences["clm"]["all"].high
    assert {count.stage: count.rejects for count in found.counts}["corpus"] == 2
