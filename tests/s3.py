"""An S3 server to test against, and the faults that a real one has now and then."""

import asyncio
import contextlib
import io
import random
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from subprocess import DEVNULL, Popen
from typing import Any
from urllib.parse import unquote

import aiohttp
from aiohttp.web import BaseRequest, Response, Server, StreamResponse
from yarl import URL

ERRORS = {  # kinds of fault that are an answer: its status and S3's code
    "500": (500, "InternalError"),
    "503": (503, "ServiceUnavailable"),
    "slowdown": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
}
OTHER_KINDS = ("reset", "lost_reply", "truncate", "flip", "hang", "412-ignored", "hide")
PASSING_KINDS = ("500", "503", "slowdown", "reset", "lost_reply", "truncate")  # now and then
HOP_HEADERS = ("connection", "keep-alive", "expect", "transfer-encoding")  # of one connection only
OWN_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # aiohttp adds them


@dataclass
class Rule:
    """What is done to the next requests that fit."""

    do: str  # the kind of fault; FaultProxy lists them
    method: str | None = None  # None for all
    match: str = ""  # what the path with the query, unquoted, must contain
    times: float = 1  # how many requests; `math.inf` for all that come

    def __post_init__(self) -> None:
        if self.do not in (*ERRORS, *OTHER_KINDS) and not self.do.startswith("stall:"):
            raise ValueError(f"no fault is called {self.do!r}; FaultProxy lists those there are")


@dataclass(frozen=True)
class Answer:
    """What the client gets, held whole."""

    status: int
    headers: dict[str, str]
    body: bytes


class MotoServer:
    """An S3 server in a process of its own. Its buckets are lost when it stops."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        self.pid = self._process.pid
        deadline = time.monotonic() + 30  # 2 s where nothing else runs
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=10).close()
                return
            time.sleep(0.1)
        self.stop()
        raise TimeoutError(f"no answer; see what it says: {' '.join(command)}")

    def stop(self) -> None:
        self._process.kill()  # nothing to tidy: it holds all in memory
        self._process.wait()


class FaultProxy:
    """Stands between S3 clients and a server, and spoils what it is told to spoil, by these faults:

    - "500", "503", "slowdown", "403", "expired": that error; the store is not asked.
    - "reset": the connection is aborted; the store is not asked.
    - "lost_reply": the store does what it is asked, then the connection is aborted.
    - "truncate": half of the answer's body (nothing, if it has none), then an end.
    - "flip": one bit in the middle of the answer's body is wrong.
    - "stall:SECONDS": a wait, then all is well. "hang": no answer, however long one waits.
    - "412-ignored": a store that knows no conditional writes; fits requests with If-None-Match.
    - "hide": an empty listing, from a store that lags behind; fits listings.
    """

    def __init__(self, upstream_port: int, seed: int) -> None:
        self.upstream_port = upstream_port
        self.rules: list[Rule] = []  # the first that fits and has times left is used
        self.share = 0.0  # of requests that no rule fits: how many fail, at random,
        self.kinds: Sequence[str] = PASSING_KINDS  # by one of these
        self.dice = random.Random(seed)  # seed it anew to see the same draws again
        self.log: list[tuple[str, str, str | None]] = []  # method, unquoted path, fault if any
        self._gone = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())

    @property
    def gone(self) -> bool:
        """Whether the storage is away: every connection is aborted, open ones at once."""
        return self._gone

    @gone.setter
    def gone(self, is_gone: bool) -> None:
        self._gone = is_gone
        if is_gone:
            self._run(self._abort_all())

    def heal(self) -> None:
        """Pass on all requests from now on. Those that hang go on hanging; the log stays."""
        self.rules, self.share, self.kinds, self.gone = [], 0.0, PASSING_KINDS, False

    def stop(self) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self) -> None:
        self._turn = asyncio.Lock()
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._store = aiohttp.ClientSession(
            connector=connector, auto_decompress=False, skip_auto_headers=OWN_HEADERS
        )
        self._server = Server(self._serve, access_log=None, auto_decompress=False)
        self._listener = await self._loop.create_server(self._server, "127.0.0.1", backlog=1024)
        self.port = int(self._listener.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        self._listener.close()
        await self._server.shutdown(timeout=0.1)  # then requests that hang are cancelled
        await self._store.close()

    async def _abort_all(self) -> None:
        for connection in self._server.connections:
            _abort(connection.transport)

    async def _serve(self, request: BaseRequest) -> StreamResponse:
        if "Expect" in request.headers and request.transport:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await request.content.read()
        fault = self._pick_fault(request)
        self.log.append((request.method, unquote(request.raw_path), fault))
        answer = await self._answer(request, body, fault or "")
        if answer is None or (fault == "truncate" and not answer.body):
            _abort(request.transport)
            return Response()  # goes nowhere
        # An answer to HEAD tells the length of a body that it does not bring.
        own = {"Content-Length": str(len(answer.body)), "Content-Type": "application/xml"}
        response = StreamResponse(status=answer.status, headers=own | answer.headers)
        await response.prepare(request)
        if fault != "truncate":
            await response.write_eof(answer.body)
        elif request.transport:
            await response.write(answer.body[: len(answer.body) // 2])
            request.transport.close()
        return response

    def _pick_fault(self, request: BaseRequest) -> str | None:
        if self.gone:
            return "gone"
        for rule in self.rules:
            if rule.times > 0 and _fits(rule, request):
                rule.times -= 1
                return rule.do
        kinds = [kind for kind in self.kinds if _fits(Rule(kind), request)]
        return self.dice.choice(kinds) if kinds and self.dice.random() < self.share else None

    async def _answer(self, request: BaseRequest, body: bytes, fault: str) -> Answer | None:
        """Return what the store, or the fault in its place, says; None for an abort."""
        if fault in ("gone", "reset"):
            return None
        if fault in ERRORS:
            status, code = ERRORS[fault]
            text = b"<Error><Code>%s</Code><Message>injected</Message></Error>" % code.encode()
            return Answer(status, {}, b"" if request.method == "HEAD" else text)
        if fault == "hide":
            return Answer(200, {}, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
        if fault == "hang":
            await asyncio.Event().wait()
        if fault.startswith("stall:"):
            await asyncio.sleep(float(fault.removeprefix("stall:")))
        dropped = "if-none-match" if fault == "412-ignored" else ""
        answer = await self._ask_store(request, body, dropped)
        if fault == "flip" and answer and answer.body:
            at = len(answer.body) // 2
            wrong = bytes([answer.body[at] ^ 1])
            return replace(answer, body=answer.body[:at] + wrong + answer.body[at + 1 :])
        return None if fault == "lost_reply" else answer

    async def _ask_store(self, request: BaseRequest, body: bytes, dropped: str) -> Answer | None:
        url = URL(f"http://127.0.0.1:{self.upstream_port}{request.raw_path}", encoded=True)
        headers, data = _drop_headers(request.headers, dropped), io.BytesIO(body)
        # moto checks a condition and writes in two steps, which are one on S3: one at a time.
        is_alone = "If-None-Match" in request.headers and not dropped
        try:
            async with (
                self._turn if is_alone else contextlib.nullcontext(),
                self._store.request(request.method, url, data=data, headers=headers) as it,
            ):
                return Answer(it.status, _drop_headers(it.headers), await it.read())
        except aiohttp.ClientError:
            return None  # as when the storage is away


def s3_environment(port: int) -> dict[str, str]:
    """Return the variables by which s3fs, and pyarrow's `FileSystem.from_uri`, find the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


def make_bucket(port: int, name: str) -> None:
    """Make a bucket; moto takes the request unsigned."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()


def _drop_headers(headers: Mapping[str, str], other: str = "") -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.lower() not in (*HOP_HEADERS, other)}


def _fits(rule: Rule, request: BaseRequest) -> bool:
    if rule.method not in (None, request.method) or rule.match not in unquote(request.raw_path):
        return False
    if rule.do == "hide":
        return request.method == "GET" and "list-type=2" in request.raw_path
    return rule.do != "412-ignored" or "If-None-Match" in request.headers


def _abort(transport: asyncio.BaseTransport | None) -> None:
    """Reset a connection: no goodbye, and bytes that are not sent yet are dropped."""
    if isinstance(transport, asyncio.Transport) and not transport.is_closing():
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
