"""Two jobs that would train one run."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rayfuse.storage import lease as lease_module
from rayfuse.storage.lease import RENEW_SECONDS, TIMEOUT_SECONDS, Lease
from rayfuse.storage.store import LocalStore

FILE = "train/fused-x/lease.json"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now[0])
    return now


def make_lease(folder: Path, job: str) -> Lease:
    return Lease(LocalStore(str(folder)), FILE, job)


def test_a_second_job_acquires_the_lease_only_after_its_release(clock, tmp_path):
    first, second = make_lease(tmp_path, "a"), make_lease(tmp_path, "b")
    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()
    assert second.holder.startswith("process ")
    second.release()  # which it does not hold
    assert not second.acquire()
    first.release()
    assert second.acquire()
    assert not first.acquire()


def test_a_renewed_lease_is_kept_and_one_that_is_not_renewed_times_out(clock, tmp_path):
    first, second = make_lease(tmp_path, "a"), make_lease(tmp_path, "b")
    first.acquire()
    for _ in range(20):
        clock[0] += RENEW_SECONDS + 1
        first.renew()
        assert not second.acquire()
    clock[0] += TIMEOUT_SECONDS - 1
    assert not second.acquire()
    clock[0] += 2
    assert second.acquire()


def test_the_timeout_of_an_older_lease_begins_when_it_is_first_seen(clock, tmp_path):
    make_lease(tmp_path, "a").acquire()
    clock[0] += 10 * TIMEOUT_SECONDS
    late = make_lease(tmp_path, "b")
    assert not late.acquire()
    clock[0] += TIMEOUT_SECONDS + 1
    assert late.acquire()


ACQUIRE = f"""
import sys
from rayfuse.storage.store import LocalStore
from rayfuse.storage.lease import Lease
assert Lease(LocalStore(sys.argv[1]), {FILE!r}, "a").acquire()
"""


def test_the_lease_of_a_process_that_died_on_this_machine_is_free_at_once(tmp_path):
    subprocess.run([sys.executable, "-c", ACQUIRE, str(tmp_path)], check=True)
    assert (tmp_path / FILE).exists()
    assert make_lease(tmp_path, "b").acquire()


HUGE_PID = json.dumps({"host": socket.gethostname(), "pid": 10**30}).encode()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"host": 1}', HUGE_PID, b"[" * 100_000]
)
def test_a_corrupt_lease_is_held_by_another_until_it_times_out(content, clock, tmp_path):
    (tmp_path / "train/fused-x").mkdir(parents=True)
    (tmp_path / FILE).write_bytes(content)
    lease = make_lease(tmp_path, "a")
    assert not lease.acquire()
    assert lease.holder.startswith(("another process", f"process {10**30}"))
    clock[0] += TIMEOUT_SECONDS + 1
    assert lease.acquire()
