"""The page over HTTP, on the loopback interface alone."""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rayfuse.config.addresses import mask_secrets
from rayfuse.config.base import UserError, first_line
from rayfuse.watch.page import Freshness, announce, describe_written, render_page, render_parts
from rayfuse.watch.snapshot import Snapshot, to_values

HOST = "127.0.0.1"

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""What a browser on this computer calls it. Any other name in a request's Host header is a foreign
site's that resolves to this address (DNS rebinding). The port may be that of a tunnel."""

POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

MAX_READING_SHARE = 0.1
"""Of the time, for reading the store: listings of very many shards take long."""

MAX_WAIT_SECONDS = 10.0
"""How long a page waits for the storage, whose requests may be retried for minutes."""

REQUEST_SECONDS = 30.0
"""A connection that sends nothing for so long is closed."""


class LiveRun:
    """The newest snapshot of a run; read again when it is requested and old. Thread-safe."""

    def __init__(self, read: Callable[[], Snapshot], refresh_seconds: float) -> None:
        self.read, self.refresh_seconds = read, refresh_seconds
        self.lock = threading.Lock()
        self.snapshot: Snapshot | None = None
        self.reading: threading.Thread | None = None
        self.began_at = self.read_at = self.ended_at = 0.0
        """When the last read began, the last one that succeeded ended, the last one ended:
        monotonic time in seconds."""
        self.pause_seconds = refresh_seconds
        self.fault: str | None = None

    def refresh(self) -> tuple[Snapshot, Freshness]:
        """Return the newest snapshot; the one before if the storage is slow.

        Raises:
            UserError: The first read failed; likewise below.
            ShardError: A record is corrupt.
            OSError: The storage cannot be read.
        """
        with self.lock:
            if self.snapshot is None:
                self._read()
            elif self.reading is None and time.monotonic() - self.ended_at >= self._pause():
                self.reading = threading.Thread(target=self._read_again, daemon=True)
                self.reading.start()
            reading = self.reading
        if reading is not None:
            reading.join(MAX_WAIT_SECONDS)
        assert self.snapshot is not None, "the first read raises its error"
        age = time.monotonic() - self.read_at
        return self.snapshot, Freshness(age, self.pause_seconds, self._describe_fault())

    def _pause(self) -> float:
        return 0.0 if self.snapshot is not None and self.snapshot.unread else self.pause_seconds

    def _describe_fault(self) -> str | None:
        waited = time.monotonic() - self.began_at
        if self.reading is not None and waited > MAX_WAIT_SECONDS:
            return f"the storage has not answered for {waited:.0f} s"
        return self.fault

    def _read(self) -> None:
        self.began_at = time.monotonic()
        self.snapshot = self.read()
        self.read_at = self.ended_at = time.monotonic()
        seconds = (self.ended_at - self.began_at) / MAX_READING_SHARE
        self.pause_seconds, self.fault = max(self.refresh_seconds, seconds), None

    def _read_again(self) -> None:
        try:
            self._read()
        except Exception as error:  # botocore's NoCredentialsError is no OSError
            self.fault = f"the storage cannot be read: {mask_secrets(first_line(error))}"
        finally:
            self.ended_at, self.reading = time.monotonic(), None


class WatchServer(ThreadingHTTPServer):
    """Serves a run's page to browsers on this computer."""

    daemon_threads = True

    def __init__(self, run: LiveRun, port: int) -> None:
        """Bind the port.

        Args:
            run: The run.
            port: 0 for any free one.

        Raises:
            UserError: The port cannot be used.
        """
        self.run = run
        try:
            super().__init__((HOST, port), WatchHandler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--port is {port}, which cannot be used ({first_line(error)}); give another "
                "one, or 0 for any free port"
            ) from error

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a browser that has closed its connection; raise any other error's report."""
        if not isinstance(sys.exc_info()[1], ConnectionError | socket.timeout):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]


class WatchHandler(BaseHTTPRequestHandler):
    """Answers one browser; reads nothing but the request's path and Host header."""

    server: WatchServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_SECONDS
    server_version, sys_version = "rayfuse", ""

    def do_GET(self) -> None:
        """Answer with the page, its script or its state."""
        name, _, port = (self.headers.get("Host") or "").rpartition(":")
        if (name if port.isdigit() else self.headers.get("Host")) not in LOOPBACK_NAMES:
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "not the name of this computer\n")
            return
        path = self.path.partition("?")[0]
        if path == "/":
            page = render_page(*self.server.run.refresh())
            self._send(HTTPStatus.OK, "text/html", page)
        elif path == "/state.json":
            state = describe_state(*self.server.run.refresh())
            self._send(HTTPStatus.OK, "application/json", state)
        elif path == "/watch.js":
            script = Path(__file__).with_name("watch.js").read_text(encoding="utf-8")
            self._send(HTTPStatus.OK, "text/javascript", script)
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "no such page\n")

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: a page that updates itself would fill the terminal."""


def describe_state(snapshot: Snapshot, freshness: Freshness) -> str:
    """Encode the numbers, and the parts of the page that show them, as JSON."""
    state = to_values(snapshot) | {
        "age_seconds": round(freshness.age_seconds, 1),
        "refresh_seconds": 1.0 if snapshot.unread else freshness.refresh_seconds,
        "fault": freshness.fault,
        "written": describe_written(snapshot),
        "announcement": announce(snapshot),
        "parts": render_parts(snapshot),
    }
    return json.dumps(state)
