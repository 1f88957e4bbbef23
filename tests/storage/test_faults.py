"""Faults of an S3 store, made by a proxy before a real server; named by their numbers."""

import json
import math
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from rayfuse.storage.dataset import DataSet
from rayfuse.storage.retry import StorageUnavailableError
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import check_store, open_store
from tests.local_cluster import free_port, listens, wait_for
from tests.s3 import Rule
from tests.storage.test_dataset import make_data_in, make_table

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def data(s3_root) -> DataSet:
    return make_data_in(open_store(s3_root, retry_seconds=60.0))


@pytest.mark.parametrize("kind", ["500", "503", "slowdown", "reset", "lost_reply"])
def test_fault_7_every_request_outlives_a_burst_of_failures(kind, data, s3_proxy):
    store = data.store
    for method in ("PUT", "GET", "DELETE"):
        s3_proxy.rules.append(Rule(kind, method=method, times=2))
    store.write("a/one", b"1")
    assert store.create("a/two", b"22")
    assert not store.create("a/two", b"other")
    assert store.read("a/one") == b"1"
    assert store.sizes("a") == {"one": 1, "two": 2}
    store.remove("a/one")
    assert store.sizes("a") == {"two": 2}
    assert sum(done == kind for _, _, done in s3_proxy.log) == 6


def test_fault_8_a_request_that_is_never_answered_is_asked_again(data, s3_proxy):
    data.store.write("a", b"1")
    s3_proxy.rules.append(Rule("hang", method="GET"))
    began = time.monotonic()
    assert data.store.read("a") == b"1"
    assert time.monotonic() - began < 60


def test_fault_8_a_storage_that_is_gone_is_said_to_be_after_its_patience(s3_root, s3_proxy):
    store = open_store(s3_root, retry_seconds=3.0)
    s3_proxy.gone = True
    with pytest.raises(
        StorageUnavailableError, match=r"has failed for \d+ s.*run the same command again"
    ):
        store.read("a")


def test_fault_8_a_storage_whose_name_is_gone_is_waited_for_as_one_that_is_away(
    s3_root, s3_proxy, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://nowhere.invalid:{s3_proxy.port}")
    store = open_store(s3_root, retry_seconds=2.0)
    with pytest.raises(StorageUnavailableError, match=r"has failed for \d+ s.*nowhere\.invalid"):
        store.read("a")
    monkeypatch.undo()
    store.reconnect()
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_fault_9_a_commit_whose_answer_is_lost_is_known_as_ours(data, s3_proxy):
    s3_proxy.rules.append(Rule("lost_reply", method="PUT", match="commits/"))
    commit = data.write_shard(0, make_table(), tokens=1)
    assert data.read_shard(commit).equals(make_table())
    assert list(data.store.sizes(f"{data.folder}/data")) == [commit.file.removeprefix("data/")]


def test_fault_10_a_shard_is_one_put_however_large(data, s3_proxy):
    """So that no part of one ever lies about: 120 MB, beyond where s3fs begins to cut."""
    noise = np.random.default_rng(0).integers(0, 2**31, 30_000_000, dtype=np.int32)
    table = make_table(1).set_column(6, "target_ids", pa.array([noise], pa.list_(pa.int32())))
    s3_proxy.log.clear()
    commit = data.write_shard(0, table, tokens=1)
    assert commit.num_bytes > 110_000_000
    uploads = [(method, path) for method, path, _ in s3_proxy.log if "/data/" in path]
    assert [method for method, _ in uploads] == ["PUT"]
    assert "upload" not in uploads[0][1]


def test_fault_11_of_eight_attempts_at_a_shard_one_counts_and_nothing_else_is_left(data, s3_proxy):
    s3_proxy.share, s3_proxy.kinds = 0.1, ["500", "reset", "lost_reply"]
    tables = [make_table(rows) for rows in range(1, 9)]
    with ThreadPoolExecutor(8) as threads:
        commits = list(threads.map(lambda table: data.write_shard(0, table, tokens=1), tables))
    s3_proxy.heal()
    assert len({commit.attempt for commit in commits}) == 1
    assert data.read_shard(commits[0]).equals(tables[commits[0].rows - 1])
    assert len(data.store.sizes(f"{data.folder}/data")) == 1


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_fault_12_bytes_spoiled_on_their_way_are_fetched_again(kind, data, s3_proxy):
    commit = data.write_shard(0, make_table(), tokens=1)
    s3_proxy.rules.append(Rule(kind, method="GET", match="/data/"))
    assert data.read_shard(commit).equals(make_table())
    assert any(done == kind for _, _, done in s3_proxy.log)


def test_fault_13_a_listing_that_lags_behind_loses_and_doubles_nothing(data, s3_proxy):
    first = data.write_shard(0, make_table(), tokens=1)
    s3_proxy.rules.append(Rule("hide", times=math.inf))
    assert data.list_committed() == set()
    assert data.is_committed(0)
    assert data.write_shard(0, make_table(2), tokens=1) == first
    with pytest.raises(ShardError, match="1 shards missing"):
        data.finish(1)
    s3_proxy.heal()
    data.finish(1)
    assert data.commits() == {0: first}


def test_fault_35_expired_credentials_are_fetched_anew(data, s3_proxy):
    data.store.write("a", b"1")
    s3_proxy.rules += [Rule("expired", method=method) for method in ("GET", "HEAD", "PUT")]
    assert data.store.read("a") == b"1"
    assert data.store.create("b", b"2")


def test_fault_35_a_refusal_is_final(data, s3_proxy):
    s3_proxy.rules.append(Rule("403", times=math.inf))
    began = time.monotonic()
    with pytest.raises(PermissionError):
        data.store.write("a", b"1")
    assert time.monotonic() - began < 10
    assert len([1 for method, _, _ in s3_proxy.log if method == "PUT"]) <= 2


def test_fault_30_a_store_that_ignores_conditions_is_refused(s3_root, s3_proxy):
    s3_proxy.rules.append(Rule("412-ignored", times=math.inf))
    with pytest.raises(ValueError, match="ignores the condition to create a file only if"):
        check_store(open_store(s3_root))


def test_fault_30_a_real_server_that_ignores_conditions_is_refused(tmp_path, monkeypatch):
    port = free_port()
    (tmp_path / "bucket").mkdir()
    server = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("rclone")),
            *("serve", "s3", str(tmp_path), "--addr", f"127.0.0.1:{port}"),
            *("--auth-key", "AKTEST,SKTEST"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SKTEST")
    try:
        wait_for(lambda: listens(port), server)
        with pytest.raises(ValueError, match="use a store with conditional writes"):
            check_store(open_store("s3://bucket/run"))
    finally:
        server.kill()
        server.wait()


def test_a_sound_store_passes_the_probe_even_while_it_stutters(s3_root, s3_proxy):
    s3_proxy.share, s3_proxy.kinds = 0.2, ["500", "reset", "lost_reply"]
    check_store(open_store(s3_root))


def test_fault_27_credentials_are_in_no_pickle_of_a_store(data, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-secret")
    store = open_store(data.store.root)
    store.write("a", b"1")
    assert b"canary" not in pickle.dumps(replace(data, store=store))
    assert "canary" not in repr(store)
    assert "canary" not in json.dumps(data.read_run())


def test_any_tool_reads_a_shard_by_pyarrow_alone(data):
    commit = data.write_shard(0, make_table(), tokens=1)
    uri = f"{data.store.root}/{data.folder}/{commit.file}"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    assert isinstance(filesystem, pyarrow.fs.S3FileSystem)
    assert pq.read_table(path, filesystem=filesystem).equals(make_table())
