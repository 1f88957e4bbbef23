"""Metrics of a running training reach the store in the background, never after its last upload."""

import threading
import time
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError

from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import LocalStore
from rayfuse.train import live
from rayfuse.train.live import WORKERS_FILE, LiveUploads, TrainWorker, read_workers, write_workers


class SlowStore(LocalStore):
    """A store whose writes wait until they may go on."""

    def write(self, name: str, data: bytes) -> None:
        assert is_released.wait(30)
        super().write(name, data)


is_released = threading.Event()


def test_an_upload_delays_no_step_and_is_waited_for(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(live, "UPLOAD_SECONDS", 0.0)
    is_released.clear()
    store = SlowStore(str(tmp_path))
    uploads = LiveUploads(store, "metrics.jsonl")
    uploads.offer(lambda: b"first")
    uploads.offer(lambda: b"while the first is written")
    assert not (tmp_path / "metrics.jsonl").exists()
    is_released.set()
    uploads.wait()
    assert store.read("metrics.jsonl") == b"first"


def test_metrics_are_encoded_only_when_an_upload_is_due(tmp_path: Path):
    encoded: list[bytes] = []
    uploads = LiveUploads(LocalStore(str(tmp_path)), "metrics.jsonl")
    uploads.offer(lambda: encoded.append(b"") or b"")
    assert not encoded


def test_a_storage_that_fails_does_not_end_the_training(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(live, "UPLOAD_SECONDS", 0.0)
    (tmp_path / "train").write_text("a file where the folder should be")
    store = LocalStore(str(tmp_path))
    uploads = LiveUploads(store, "train/metrics.jsonl")
    uploads.offer(lambda: b"lost")
    uploads.wait()
    (tmp_path / "train").unlink()
    uploads.due = 0.0
    uploads.offer(lambda: b"kept")
    uploads.wait()
    assert store.read("train/metrics.jsonl") == b"kept"


class ExpiredStore(LocalStore):
    """A store whose client fails with an error that is no OSError."""

    def write(self, name: str, data: bytes) -> None:
        raise NoCredentialsError


def test_an_error_of_the_storages_client_ends_no_training_and_is_not_repeated_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(live, "UPLOAD_SECONDS", 0.0)
    uploads = LiveUploads(ExpiredStore(str(tmp_path)), "train/metrics.jsonl")
    monkeypatch.setattr(live, "UPLOAD_SECONDS", 60.0)
    uploads.offer(lambda: b"lost")
    uploads.wait()  # pytest reports an error that ends a thread
    assert uploads.due > time.monotonic() + 30


def test_the_workers_of_a_run_are_stored_with_their_gpus(tmp_path: Path):
    store = LocalStore(str(tmp_path))
    assert read_workers(store, "train/fused-0") == []
    write_workers(store, "train/fused-0", [TrainWorker(0, "node-1", 42, ["3"])])
    (worker,) = read_workers(store, "train/fused-0")
    assert worker == TrainWorker(0, "node-1", 42, ["3"])
    store.write(f"train/fused-0/{WORKERS_FILE}", b'{"workers": [')
    with pytest.raises(ShardError, match=r"workers.json is no record"):
        read_workers(store, "train/fused-0")
