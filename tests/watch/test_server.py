"""The page over HTTP on loopback: for this computer's browsers, whatever happens to the storage."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from botocore.exceptions import NoCredentialsError

import rayfuse
from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.watch import server as server_module
from rayfuse.watch.command import open_server
from rayfuse.watch.server import LiveRun, WatchServer
from rayfuse.watch.snapshot import RunReader, Snapshot
from tests.watch.conftest import serve

CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None
)


def request(
    server: WatchServer, path: str, host: str | None = "localhost", method: str = "GET"
) -> tuple[int, str, str]:
    """Request a path; return the status, the Content-Type and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.getheader("Content-Type", ""), body


def test_page_script_and_state_are_served_with_the_numbers_of_status(recipe: Recipe):
    with serve(recipe) as server:
        status, kind, page = request(server, "/")
        assert (status, kind) == (200, "text/html; charset=utf-8")
        assert "8 of 8 shards" in page
        assert request(server, "/watch.js")[1] == "text/javascript; charset=utf-8"
        state = json.loads(request(server, "/state.json")[2])
    expected = rayfuse.open_run(recipe).status()
    assert state["stages"] == expected["stages"]
    for label, numbers in state["data_sets"].items():
        assert numbers == {key: expected["data_sets"][label][key] for key in numbers}
    assert 0 <= state["age_seconds"] < 60
    assert state["fault"] is None
    assert set(state["parts"]) == {name for name in state["parts"] if f'data-part="{name}"' in page}


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "localhost:8080", "[::1]:9"])
def test_a_tunnels_port_is_served(recipe: Recipe, host: str):
    with serve(recipe) as server:
        assert request(server, "/state.json", host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [None, "", "evil.example", "evil.example:80", "localhost.evil.example", "192.168.0.1:80"],
)
def test_a_foreign_name_that_resolves_to_loopback_is_refused(stored: Recipe, host: str | None):
    with serve(stored) as server:
        status, _, body = request(server, "/state.json", host)
        assert (status, body) == (403, "not the name of this computer\n")


def test_only_its_own_paths_and_methods_are_answered(stored: Recipe):
    with serve(stored) as server:
        assert request(server, "/../../etc/passwd")[0] == 404
        assert request(server, "/", method="POST")[0] == 501
        status, _, body = request(server, "/", method="HEAD")
        assert (status, body) == (200, "")


def test_only_loopback_is_bound_and_a_taken_port_is_named(stored: Recipe):
    with serve(stored) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(UserError, match=rf"--port is {server.server_port}, which cannot be"):
            open_server(stored, server.server_port)
    with pytest.raises(UserError, match="--port is 70000, which cannot be used"):
        open_server(stored, 70_000)


def test_a_storage_that_fails_leaves_the_last_numbers_and_says_so(stored: Recipe):
    reader = RunReader(stored)
    live = LiveRun(reader.read, 0.0)
    first, freshness = live.refresh()
    assert freshness.fault is None

    def fail() -> None:
        raise OSError("no route to s3://key:secret@host/x")

    live.read, live.pause_seconds = fail, 0.0
    time.sleep(0.05)
    second, freshness = live.refresh()
    assert second is first
    assert freshness.age_seconds >= 0.05
    assert freshness.fault is not None
    assert freshness.fault.startswith("the storage cannot be read: no route to s3://***@host")


def test_an_error_of_the_storages_client_is_shown_until_a_read_succeeds(stored: Recipe):
    live = LiveRun(RunReader(stored).read, 0.0)
    first, _ = live.refresh()
    read = live.read

    def fail() -> Snapshot:
        raise NoCredentialsError  # no OSError

    live.read, live.pause_seconds = fail, 0.0
    second, freshness = live.refresh()
    assert second is first
    assert freshness.fault == "the storage cannot be read: Unable to locate credentials"
    live.read = read
    third, freshness = live.refresh()
    assert (third is first, freshness.fault) == (False, None)


def test_a_storage_that_does_not_answer_leaves_the_last_numbers(stored: Recipe, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_WAIT_SECONDS", 0.05)
    live = LiveRun(RunReader(stored).read, 0.0)
    first, _ = live.refresh()
    is_released, read = threading.Event(), live.read
    live.pause_seconds = 0.0

    def stall() -> Snapshot:
        assert is_released.wait(30)
        return read()

    live.read = stall
    second, freshness = live.refresh()
    assert second is first
    assert freshness.fault == "the storage has not answered for 0 s"
    is_released.set()
    reading = live.reading
    if reading is not None:
        reading.join()
    assert live.fault is None
    assert live.snapshot is not first


def test_a_slow_read_is_not_repeated_at_once(stored: Recipe, monkeypatch):
    reader = RunReader(stored)
    monkeypatch.setattr(server_module, "MAX_READING_SHARE", 1e-6)
    live = LiveRun(reader.read, 1.0)
    while live.refresh()[0].unread:
        pass
    first, freshness = live.refresh()
    assert freshness.refresh_seconds > 60
    live.ended_at -= 30
    assert live.refresh()[0] is first


def test_the_command_prints_its_address_and_ends_with_ctrl_c(stored: Recipe, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(stored.model_dump(mode="json", by_alias=True)))
    command = [str(Path(sys.executable).with_name("rayfuse")), "watch", str(path), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert b"rayfuse watch" in answer.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    port = int(address.rstrip("/").rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_updates_the_page_by_itself(recipe: Recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_READING_SHARE", 1e9)
    captured = RunReader(recipe).layout.captured["neox"]
    with serve(recipe) as server:
        read, times = server.run.read, []

        def read_and_lose_a_shard() -> Snapshot:
            """Lose a shard after the page itself was served."""
            times.append(time.monotonic())
            if len(times) == 2:
                captured.drop_shards([3])
            return read()

        server.run.read = read_and_lose_a_shard
        server.run.refresh_seconds = server.run.pause_seconds = 0.05
        assert CHROMIUM is not None
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=8000"),
            server.address,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert len(times) > 1
    assert "7 of 8 shards" in done.stdout
    assert "Refused to" not in done.stderr  # by the page's own policy
