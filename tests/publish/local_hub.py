"""A hub on loopback: the endpoints of the Hugging Face hub that a commit of a model needs.

It stores what it is sent, refuses what the hub refuses (tokens, names, metadata of cards), and logs
every request.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "t" * 34
READ_TOKEN = "hf_" + "r" * 34


@dataclass
class Repository:
    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class LocalHub:
    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256."""
    log: list[str] = field(default_factory=list)
    """Requests: method and path."""


@contextmanager
def serve_hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RefusedError(Exception):
    """A status other than 200, with the hub's error code for its client."""

    def __init__(self, status: int, message: str, code: str = "", **values: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.values = {"error": message} | values


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append(f"{self.command} {path}")
        headers: dict[str, str] = {}
        try:
            status, values = 200, self._route(path, body)
        except RefusedError as refused:
            status, values = refused.status, refused.values
            headers = {"X-Error-Message": str(refused), "X-Error-Code": refused.code}
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _route(self, path: str, body: bytes) -> Any:
        if self.command == "PUT" and (match := re.fullmatch(r"/lfs/(\w{64})", path)):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.objects[match[1]] = body
            return {}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            raise RefusedError(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "alice", "orgs": [{"name": "lab"}], "auth": {}}
        if path == "/api/validate-yaml":
            return _validate_card(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        match = re.fullmatch(r"/(?:api/models/)?(\w+/[\w.-]+?)(?:\.git)?((?:/.*)?)", path)
        assert match is not None, path
        repository = self.hub.repositories.get(match[1])
        if repository is None:
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return self._route_in(match[1], repository, match[2], body)

    def _create(self, values: dict[str, Any], token: str) -> Any:
        if token == READ_TOKEN:
            raise RefusedError(
                403, "You don't have the rights to create a model under the namespace"
            )
        name = f"{values.get('organization') or 'alice'}/{values['name']}"
        if name in self.hub.repositories:
            raise RefusedError(409, "You already created this model repo", url=self._name(name))
        self.hub.repositories[name] = Repository(values["visibility"] == "private")
        return {"url": self._name(name), "name": name}

    def _name(self, name: str) -> str:
        return f"{self.hub.address}/{name}"

    def _route_in(self, name: str, repository: Repository, path: str, body: bytes) -> Any:
        if path in ("", "/revision/main"):
            siblings = [{"rfilename": file} for file in repository.files]
            values = {"id": name, "private": repository.is_private, "siblings": siblings}
            return values | {"sha": "c" * 40}
        if path == "/tree/main":
            return [
                {"type": "file", "path": file, "size": len(content), "oid": "0"}
                for file, content in repository.files.items()
            ]
        if path == "/preupload/main":
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith("s") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        if path == "/info/lfs/objects/batch":
            return {"transfer": "basic", "objects": [self._place(o) for o in _objects(body)]}
        assert path == "/commit/main", path
        return self._commit(name, repository, body)

    def _place(self, found: dict[str, Any]) -> dict[str, Any]:
        if found["oid"] in self.hub.objects:
            return found
        href = f"{self.hub.address}/lfs/{found['oid']}"
        return found | {"actions": {"upload": {"href": href}}}

    def _commit(self, name: str, repository: Repository, body: bytes) -> Any:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line["key"]
                del repository.files[value["path"]]
        return {"commitUrl": f"{self.hub.address}/{name}/commit/{'d' * 40}", "commitOid": "d" * 40}


def _objects(body: bytes) -> list[dict[str, Any]]:
    return json.loads(body)["objects"]


def _validate_card(content: str) -> dict[str, Any]:
    """Check a card's metadata as the hub does: base models must be hub ids."""
    front = yaml.safe_load(content.split("---\n")[1])
    base = front.get("base_model", "a/b")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise RefusedError(400, f'"base_model" with value "{base}" is not valid')
    return {"errors": [], "warnings": []}
