"""The object store on a real S3 server (moto, loopback), through s3fs."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs

from rayfuse.storage.object_store import ObjectStore
from rayfuse.storage.rejects import Reject
from rayfuse.storage.store import Store, check_store, open_store
from tests.s3 import make_bucket
from tests.storage.test_dataset import make_data_in, make_table


@pytest.fixture
def bucket(s3_root: str) -> Store:
    return open_store(s3_root)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_shards_on_s3_are_committed_once_and_read_back_checked(bucket):
    assert isinstance(bucket, ObjectStore)
    check_store(bucket)
    data = make_data_in(bucket)
    first = data.write_shard(0, make_table(3), tokens=1, rejects=[Reject("x", "empty")])
    second = data.write_shard(0, make_table(4), tokens=2)
    assert second == first
    assert data.read_shard(first).equals(make_table(3))
    assert list(bucket.sizes(f"{data.folder}/data")) == [first.file.removeprefix("data/")]
    data.finish(1)
    assert data.is_complete()
    bucket.remove(f"{data.folder}/{first.file}")
    assert not data.is_complete()
    assert data.drop_missing_shards() == [0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_of_many_writers_of_one_name_exactly_one_creates_it(bucket):
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda i: bucket.create("commit", b"%d" % i), range(8)))
    assert made.count(True) == 1
    assert bucket.read("commit") == b"%d" % made.index(True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("place", ["a.b.c/run", "odd/r un+%20\u00e9", "odd/a=b&c", "odd/deep/er"])
def test_odd_buckets_and_prefixes_hold_what_is_written(place, s3_proxy, tmp_path):
    bucket = place.partition("/")[0]
    if not s3fs.S3FileSystem().exists(bucket):
        make_bucket(s3_proxy.upstream_port, bucket)
    store = open_store(f"s3://{place}")
    data = make_data_in(store)
    commit = data.write_shard(0, make_table(3), tokens=1)
    assert data.read_shard(commit).equals(make_table(3))
    data.finish(1)
    assert data.is_complete()
    (tmp_path / "weights").write_bytes(b"weights")
    store.upload(str(tmp_path / "weights"), "model/weights")
    store.download("model/weights", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == b"weights"
    assert store.sizes("model") == {"weights": 7}
    assert store.folders("corpus") == [data.fingerprint]
    store.remove("model/weights")
    assert store.sizes("model") == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_endpoint_that_only_the_aws_profile_names_is_used(s3_proxy, tmp_path, monkeypatch):
    make_bucket(s3_proxy.upstream_port, "by-profile")
    config = Path(tmp_path, "config")
    config.write_text(f"[profile odd]\nendpoint_url = http://127.0.0.1:{s3_proxy.port}\n")
    for name in [name for name in os.environ if name.startswith("AWS_ENDPOINT")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "odd")
    s3fs.S3FileSystem.clear_instance_cache()
    s3_proxy.log.clear()
    try:
        store = open_store("s3://by-profile/run")
        store.write("a", b"b")
        assert store.read("a") == b"b"
        assert len(s3_proxy.log) >= 2
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
