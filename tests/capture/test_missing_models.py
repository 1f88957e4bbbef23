"""Models that cannot be had: reported before anything starts, with the model's name."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from rayfuse.models.files import forget_model_files, read_model_files
from tests.capture.test_faults import model

__all__ = ["model"]  # a fixture


class FakeHub(BaseHTTPRequestHandler):
    """A model hub that refuses access."""

    STATUSES: ClassVar = {"gated": 403, "private": 401, "missing": 404}

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        name = self.path.split("/")[2]
        self.server.asked.append(name)
        self.send_response(self.STATUSES[name])
        if name == "gated":
            self.send_header("X-Error-Code", "GatedRepo")
        if name == "missing":
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("gated", "accept its terms on the hub, with the account of the token in HF_TOKEN"),
        ("private", "renew HF_TOKEN, which the hub refuses, or unset it"),
        ("missing", "check the name; if the model is private, set HF_TOKEN"),
        ("offline", "give a local folder, or connect to the hub without HF_HUB_OFFLINE"),
    ],
)
def test_fault_16_an_inaccessible_model_is_reported_before_anything_starts(
    name, remedy, hub, model, tmp_path
):
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": "some text"}))
    recipe = {
        "storage": str(tmp_path / "out"),
        "corpus": {"documents": str(tmp_path / "docs.jsonl"), "max_tokens": 128},
        "target": {"model": model.model},
        "sources": [{"name": "s", "model": f"lab/{name}"}],
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1" if name == "offline" else "0",
        "HF_TOKEN": "",
    }
    command = str(Path(sys.executable).with_name("rayfuse"))
    began = time.monotonic()
    done = subprocess.run(
        [command, "run", str(tmp_path / "r.yaml")],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("rayfuse: error")]
    assert len(message) == 1
    assert "source s" in message[0] and f"'lab/{name}'" in message[0]
    assert message[0].endswith(remedy)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - began < 60
    assert hub.asked.count(name) <= 3  # a refusal is final


def test_fault_16_weights_in_another_format_than_safetensors_are_refused(model, tmp_path):
    folder = Path(model.model)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    forget_model_files()
    with pytest.raises(ValueError, match=r"not safetensors \(pytorch_model\.bin\).* convert them"):
        read_model_files(model)
