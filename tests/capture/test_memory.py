"""The memory policy on its own: a fake device with a limit in place of a model."""

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest

from rayfuse.capture.engines.base import EngineMemoryError, Failure
from rayfuse.capture.engines.load import ENGINES
from rayfuse.capture.engines.memory import RETRY_SECONDS, BatchScorer
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.models import BACKENDS, BackendName


def make_record(length: int) -> TopLogprobs:
    ids, logprobs = np.zeros((length, 1), dtype=np.int32), np.zeros((length, 1))
    return TopLogprobs(ids, logprobs, logprobs[:, 0], logprobs[:, 0], ids[:, :0])


class FakeBatch:
    """A scored batch; its records have the length of their rows and no content."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self.rows = rows

    def wait(self) -> list[TopLogprobs]:
        return [make_record(len(row)) for row in self.rows]


class FakeDevice:
    """Scores batches of up to a limit of tokens, and fails on rows that hold a bad token."""

    def __init__(self, find_limit: Callable[[], int], bad_token: int = -1) -> None:
        self.find_limit, self.bad_token = find_limit, bad_token
        self.batches: list[list[int]] = []

    def score(self, rows: list[np.ndarray]) -> FakeBatch:
        self.batches.append([len(row) for row in rows])
        if sum(self.batches[-1]) > self.find_limit():
            raise MemoryError("out of memory")
        if any(self.bad_token in row for row in rows):
            raise IndexError("index out of range\nand more")
        return FakeBatch(rows)


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Return the pauses before retries, none of which lasts."""
    slept: list[float] = []
    monkeypatch.setattr("rayfuse.capture.engines.memory.time.sleep", slept.append)
    return slept


def make_rows(*lengths: int) -> list[np.ndarray]:
    return [np.arange(length) + 1 for length in lengths]


def score(scorer: BatchScorer, rows: list[np.ndarray]) -> list[int | Failure]:
    """Score rows, and return the length of each record."""
    return [
        found if isinstance(found, Failure) else len(found.top_ids)
        for found in scorer.score_rows(rows)
    ]


def test_batches_are_halved_until_they_fit_and_stay_small(pauses):
    device = FakeDevice(lambda: 30)
    scorer = BatchScorer(device.score, batch_tokens=80)
    assert score(scorer, make_rows(10, 20, 10, 20)) == [10, 20, 10, 20]
    assert device.batches == [[20, 20, 10, 10], [20, 20], [20], [20], [10, 10]]
    assert scorer.batch_tokens == 20
    assert not pauses


def test_a_row_too_long_for_the_device_fails_once_its_half_fits(pauses):
    scorer = BatchScorer(FakeDevice(lambda: 60).score, batch_tokens=100)
    out_of_memory = Failure("out of memory")
    assert score(scorer, make_rows(50, 90, 30)) == [50, out_of_memory, 30]
    assert pauses == list(RETRY_SECONDS)
    assert scorer.too_long_tokens == 90
    assert score(scorer, make_rows(95, 40)) == [out_of_memory, 40]
    assert pauses == list(RETRY_SECONDS)  # a row of that length is not retried


def test_a_temporary_shortage_loses_no_row_and_restores_the_batch_size(pauses):
    scorer = BatchScorer(FakeDevice(lambda: 100 if pauses else 5).score, batch_tokens=50)
    assert score(scorer, make_rows(10, 20)) == [10, 20]
    assert pauses == [RETRY_SECONDS[0]]
    assert scorer.batch_tokens == 50


def test_a_lasting_shortage_raises_instead_of_rejecting_rows(pauses):
    scorer = BatchScorer(FakeDevice(lambda: 3).score, batch_tokens=50)
    with pytest.raises(EngineMemoryError, match="no memory for 5 tokens, 31 s after"):
        scorer.score_rows(make_rows(10))


def test_a_row_that_the_model_fails_on_is_found_by_halving(pauses):
    device = FakeDevice(lambda: 1000, bad_token=8)
    scorer = BatchScorer(device.score, batch_tokens=100)
    found = score(scorer, make_rows(5, 6, 9, 7))
    assert found == [5, 6, Failure("model fails: index out of range"), 7]
    assert scorer.batch_tokens == 100
    assert not pauses


def test_an_error_of_the_gpu_itself_is_raised():
    def fail(rows: list[np.ndarray]) -> FakeBatch:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        BatchScorer(fail, batch_tokens=10).score_rows(make_rows(3))


def test_every_backend_has_an_engine_and_its_properties():
    assert set(get_args(BackendName)) == set(BACKENDS) == set(ENGINES)
