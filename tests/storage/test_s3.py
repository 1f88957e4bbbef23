"""The object store on a real S3 server (moto, loopback), through s3fs."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from rayfuse.storage.object_store import ObjectStore
from rayfuse.storage.rejects import Reject
from rayfuse.storage.store import Store, check_store, open_store
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
