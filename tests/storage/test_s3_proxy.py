"""Each fault that the S3 proxy makes, seen by plain clients that ask only once."""

import contextlib
import http.client
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.s3 import PASSING_KINDS, FaultProxy, Rule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BODY = bytes(range(250)) * 4


class Bucket:
    """One bucket through botocore, each request sent once."""

    def __init__(self, name: str, read_timeout: float = 30) -> None:
        import botocore.session
        from botocore.config import Config

        config = Config(retries={"max_attempts": 0}, read_timeout=read_timeout)
        self.client = botocore.session.Session().create_client("s3", config=config)
        self.name = name

    def put(self, key: str, body: bytes = BODY, **headers: str) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=body, **headers)

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name)
        return [entry["Key"] for entry in found.get("Contents", [])]


@pytest.fixture
def bucket(s3_root: str) -> Bucket:
    return Bucket(s3_root.split("/")[2])


def open_raw(proxy: FaultProxy, bucket: Bucket, key: str) -> Any:
    return urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/{bucket.name}/{key}", timeout=9)


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("500", 500, "InternalError"),
        ("503", 503, "ServiceUnavailable"),
        ("slowdown", 503, "SlowDown"),
        ("403", 403, "AccessDenied"),
        ("expired", 400, "ExpiredToken"),
    ],
)
def test_an_error_is_told_and_the_store_is_not_asked(s3_proxy, bucket, kind, status, code):
    from botocore.exceptions import ClientError

    s3_proxy.rules = [Rule(kind, method="PUT")]
    with pytest.raises(ClientError, match=code) as caught:
        bucket.put("a")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert bucket.names() == []
    bucket.put("a")
    assert bucket.read("a") == BODY
    assert [fault for _, _, fault in s3_proxy.log] == [kind, None, None, None]


@pytest.mark.parametrize(("kind", "stored"), [("reset", []), ("lost_reply", ["a"])])
def test_an_aborted_put_is_done_only_if_its_answer_was_lost(s3_proxy, bucket, kind, stored):
    from botocore.exceptions import HTTPClientError

    s3_proxy.rules = [Rule(kind)]
    with pytest.raises(HTTPClientError, match=r"closed|reset"):
        bucket.put("a")
    assert bucket.names() == stored
    assert len(s3_proxy.log) == 2


def test_a_truncated_answer_has_half_its_body(s3_proxy, bucket):
    bucket.put("a", ACL="public-read")
    s3_proxy.rules = [Rule("truncate", method="GET")]
    with open_raw(s3_proxy, bucket, "a") as answer:
        assert answer.headers["Content-Length"] == "1000"
        with pytest.raises(http.client.IncompleteRead) as caught:
            answer.read()
    assert caught.value.partial == BODY[:500]


def test_a_truncated_answer_without_a_body_is_none(s3_proxy, bucket):
    from botocore.exceptions import HTTPClientError

    s3_proxy.rules = [Rule("truncate")]
    with pytest.raises(HTTPClientError, match=r"closed|reset"):
        bucket.put("a")
    assert bucket.names() == ["a"]


def test_a_flip_changes_one_bit_in_the_middle(s3_proxy, bucket):
    bucket.put("a", ACL="public-read")
    s3_proxy.rules = [Rule("flip", method="GET")]
    with open_raw(s3_proxy, bucket, "a") as answer:
        spoilt = answer.read()
    assert len(spoilt) == len(BODY)
    wrong = [(i, a ^ b) for i, (a, b) in enumerate(zip(spoilt, BODY, strict=True)) if a != b]
    assert wrong == [(500, 1)]


def test_a_stall_only_takes_time(s3_proxy, bucket):
    s3_proxy.rules = [Rule("stall:0.3", method="PUT")]
    began = time.monotonic()
    bucket.put("a")
    assert time.monotonic() - began >= 0.3
    assert bucket.read("a") == BODY


def test_a_hanging_request_is_never_answered(s3_proxy, bucket):
    from botocore.exceptions import ReadTimeoutError

    s3_proxy.rules = [Rule("hang")]
    with pytest.raises(ReadTimeoutError, match="timeout"):
        Bucket(bucket.name, read_timeout=0.5).put("a")
    assert bucket.names() == []


def test_a_store_that_ignores_conditions_lets_two_create_one_object(s3_proxy, bucket):
    from botocore.exceptions import ClientError

    bucket.put("a", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        bucket.put("a", IfNoneMatch="*")
    s3_proxy.rules = [Rule("412-ignored", times=math.inf)]
    bucket.put("a", b"late", IfNoneMatch="*")
    assert bucket.read("a") == b"late"
    assert [fault for _, _, fault in s3_proxy.log] == [None, None, "412-ignored", None]


def test_a_hidden_listing_is_empty_and_nothing_else_is_hidden(s3_proxy, bucket):
    s3_proxy.rules = [Rule("hide", match=bucket.name)]
    bucket.put("a")
    assert bucket.read("a") == BODY
    assert bucket.names() == []
    assert bucket.names() == ["a"]


def test_a_storage_that_is_gone_aborts_all_until_it_is_healed(s3_proxy, bucket):
    from botocore.exceptions import HTTPClientError

    bucket.put("a")
    s3_proxy.rules = [Rule("hang")]
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(open_raw, s3_proxy, bucket, "a")
        while len(s3_proxy.log) < 2:
            time.sleep(0.01)
        s3_proxy.gone = True
        with pytest.raises(ConnectionError):
            hanging.result(5)
    with pytest.raises(HTTPClientError, match=r"closed|reset"):
        bucket.read("a")
    s3_proxy.heal()
    assert bucket.read("a") == BODY


def test_a_rule_fits_a_method_and_a_part_of_the_path_a_number_of_times(s3_proxy, bucket):
    s3_proxy.rules = [Rule("403", "GET", "b c", times=2)]
    faults = []
    for key in ("a", "b c", "a", "b c", "b c"):
        bucket.put(key)
        with contextlib.suppress(Exception):
            bucket.read(key)
        faults.append(s3_proxy.log[-1])
    assert [fault for _, _, fault in faults] == [None, "403", None, "403", None]
    assert faults[1][:2] == ("GET", f"/{bucket.name}/b c")


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="no fault is called 'slow'"):
        Rule("slow")


def test_a_share_of_requests_fails_the_same_way_for_the_same_seed(s3_proxy, bucket):
    def faults_of(seed: int) -> list[str | None]:
        s3_proxy.dice.seed(seed)
        s3_proxy.log.clear()
        for _ in range(40):
            with contextlib.suppress(OSError, http.client.HTTPException):
                open_raw(s3_proxy, bucket, "a").read()
        return [fault for _, _, fault in s3_proxy.log]

    s3_proxy.share = 0.5
    first = faults_of(1)
    assert faults_of(1) == first != faults_of(2)
    assert 10 <= 40 - first.count(None) <= 30
    assert set(first) <= {*PASSING_KINDS, None}


def test_one_connection_serves_many_requests_and_a_head_has_no_body(s3_proxy, bucket):
    connection = http.client.HTTPConnection("127.0.0.1", s3_proxy.port, timeout=9)
    sockets, public = set(), {"x-amz-acl": "public-read"}
    for method, status, length in [("PUT", 200, 0), ("HEAD", 200, 0), ("GET", 200, 1000)]:
        connection.request(method, f"/{bucket.name}/a", BODY if method == "PUT" else None, public)
        answer = connection.getresponse()
        assert (answer.status, len(answer.read())) == (status, length)
        if method == "HEAD":
            assert answer.headers["Content-Length"] == "1000"
        sockets.add(connection.sock)
    connection.request("DELETE", f"/{bucket.name}/a")
    assert connection.getresponse().status == 204
    assert len(sockets) == 1
    connection.close()


def test_a_body_in_chunks_arrives_whole(s3_proxy, bucket):
    connection = http.client.HTTPConnection("127.0.0.1", s3_proxy.port, timeout=9)
    parts = iter([BODY, b"x", BODY])
    connection.request("PUT", f"/{bucket.name}/a", parts, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert bucket.read("a") == BODY + b"x" + BODY


def test_a_client_that_waits_to_send_its_body_is_told_to_go_on(s3_proxy, bucket):
    with socket.create_connection(("127.0.0.1", s3_proxy.port), timeout=9) as client:
        head = f"PUT /{bucket.name}/a HTTP/1.1\r\nHost: s3\r\nContent-Length: 1000\r\n"
        client.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert client.recv(99) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BODY)
        assert client.recv(99).startswith(b"HTTP/1.1 200")
    assert bucket.read("a") == BODY


def test_s3fs_passes_unharmed(s3_root):
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    large = os.urandom(2**23)
    files.pipe_file(f"{s3_root}/folder/large", large)
    files.pipe_file(f"{s3_root}/folder/empty", b"")
    assert files.cat_file(f"{s3_root}/folder/large") == large
    found = files.ls(f"{s3_root}/folder", detail=True)
    assert [(entry["name"].split("/")[-1], entry["size"]) for entry in found] == [
        ("empty", 0),
        ("large", 2**23),
    ]
    files.rm_file(f"{s3_root}/folder/large")
    assert not files.exists(f"{s3_root}/folder/large")


def test_of_eight_s3fs_writers_one_creates_an_object(s3_root):
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    start = threading.Barrier(8)

    def create(i: int) -> bool:
        start.wait(9)
        try:
            files.pipe_file(f"{s3_root}/one", b"%d" % i, mode="create")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(create, range(8)))
    assert made.count(True) == 1
    assert files.cat_file(f"{s3_root}/one") == b"%d" % made.index(True)


def test_pyarrow_passes_unharmed(s3_root):
    from pyarrow import fs

    files, root = fs.FileSystem.from_uri(s3_root)  # S3FileSystem() minds no AWS_ENDPOINT_URL
    assert isinstance(files, fs.S3FileSystem)
    large = os.urandom(2**23)
    for name, data in [("large", large), ("empty", b"")]:
        with files.open_output_stream(f"{root}/folder/{name}") as stream:
            stream.write(data)
    with files.open_input_stream(f"{root}/folder/large") as stream:
        assert stream.read() == large
    found = files.get_file_info(fs.FileSelector(f"{root}/folder"))
    assert sorted((entry.base_name, entry.size) for entry in found) == [
        ("empty", 0),
        ("large", 2**23),
    ]
    files.delete_file(f"{root}/folder/large")
    assert files.get_file_info(f"{root}/folder/large").type is fs.FileType.NotFound
