"""Two jobs that would train one run."""

import subprocess
import sys
from pathlib import Path

import pytest

from rayfuse.storage import lease as hold_module
from rayfuse.storage.lease import BEAT_SECONDS, STALE_SECONDS, Lease
from rayfuse.storage.store import LocalStore

NAME = "train/fused-x/lease.json"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(hold_module.time, "monotonic", lambda: now[0])
    return now


def make_hold(folder: Path, job: str) -> Lease:
    return Lease(LocalStore(str(folder)), NAME, job)


def test_the_second_job_waits_until_the_first_lets_go(clock, tmp_path):
    first, second = make_hold(tmp_path, "a"), make_hold(tmp_path, "b")
    assert first.take()
    assert first.take()
    assert not second.take()
    assert second.holder.startswith("process ")
    second.release()  # which is not its own
    assert not second.take()
    first.release()
    assert second.take()
    assert not first.take()


def test_one_that_goes_on_saying_so_keeps_it_and_one_that_is_silent_loses_it(clock, tmp_path):
    first, second = make_hold(tmp_path, "a"), make_hold(tmp_path, "b")
    first.take()
    for _ in range(20):
        clock[0] += BEAT_SECONDS + 1
        first.renew()
        assert not second.take()
    clock[0] += STALE_SECONDS - 1
    assert not second.take()
    clock[0] += 2
    assert second.take()


def test_a_file_that_was_there_before_is_given_time(clock, tmp_path):
    make_hold(tmp_path, "a").take()
    clock[0] += 10 * STALE_SECONDS
    late = make_hold(tmp_path, "b")
    assert not late.take()
    clock[0] += STALE_SECONDS + 1
    assert late.take()


TAKE = f"""
import sys
from rayfuse.storage.store import LocalStore
from rayfuse.train.hold import Lease
assert Lease(LocalStore(sys.argv[1]), {NAME!r}, "a").take()
"""


def test_the_place_of_a_process_that_has_died_here_is_free_at_once(tmp_path):
    subprocess.run([sys.executable, "-c", TAKE, str(tmp_path)], check=True)
    assert (tmp_path / NAME).exists()
    assert make_hold(tmp_path, "b").take()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"host": 1}'])
def test_a_torn_file_is_anothers_until_it_is_stale(content, clock, tmp_path):
    (tmp_path / "train/fused-x").mkdir(parents=True)
    (tmp_path / NAME).write_bytes(content)
    hold = make_hold(tmp_path, "a")
    assert not hold.take()
    assert hold.holder == "another process"
    clock[0] += STALE_SECONDS + 1
    assert hold.take()
