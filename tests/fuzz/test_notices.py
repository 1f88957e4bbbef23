"""Mutated answers of a metadata service: a deadline, none, or an error that the watch survives."""

import threading
import time
from collections.abc import Iterator
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given

from rayfuse.runtime.preemption import CLOUDS
from tests.fuzz.mutations import edits, fuzz, mutate_bytes

ANSWERS = {
    "aws": b'{"action": "terminate", "time": "2026-09-18T08:22:00Z"}',
    "gcp": b"TRUE",
}


class _Service(BaseHTTPRequestHandler):
    answer = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def do_PUT(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("cloud", ANSWERS)
def test_an_answer_with_mutated_bytes(cloud, url):
    @fuzz(60)
    @given(edits)
    def check(drawn):
        _Service.answer = mutate_bytes(ANSWERS[cloud], drawn)
        try:
            deadline = CLOUDS[cloud](url)
        except (OSError, HTTPException, ValueError, RecursionError):  # as the polling does
            return
        assert deadline is None or 0 < deadline < time.time() + 1e10

    check()
