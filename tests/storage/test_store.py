"""A local store: nothing outside its root is touched, and what is written is on the disk."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rayfuse.storage.object_store import ObjectStore
from rayfuse.storage.seal import ShardError
from rayfuse.storage.store import LocalStore, Store

NAMES = ("../secret", "a/../../secret", "/secret", "a//b", "./a", "a/..", "", "a/\0b")

CALLS: dict[str, Callable[[Store, str], object]] = {
    "read": lambda store, name: store.read(name),
    "write": lambda store, name: store.write(name, b"1"),
    "upload": lambda store, name: store.upload(__file__, name),
    "download": lambda store, name: store.download(name, os.devnull),
    "hash_file": lambda store, name: store.hash_file(name),
    "create": lambda store, name: store.create(name, b"1"),
    "sizes": lambda store, name: store.sizes(name),
    "folders": lambda store, name: store.folders(name),
    "walk": lambda store, name: store.walk(name),
    "remove": lambda store, name: store.remove(name),
    "remove_empty": lambda store, name: store.remove_empty(name),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["folder", "fsspec"])
def test_a_name_that_leaves_the_root_is_refused(kind, name, call, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root/a").mkdir(parents=True)
    root = str(tmp_path / "root")
    store = LocalStore(root) if kind == "folder" else ObjectStore(f"local://{root}")
    with pytest.raises(ShardError, match="leads out of the storage"):
        CALLS[call](store, name)
    assert (tmp_path / "secret").read_bytes() == b"secret"


@pytest.mark.parametrize("call", [name for name in CALLS if name != "folders"])
def test_a_link_that_leaves_the_root_is_refused(call, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(outside)
    store = LocalStore(str(tmp_path / "root"))
    with pytest.raises(ShardError, match="behind a link that leads out of the storage"):
        CALLS[call](store, "link/secret" if call != "sizes" else "link/x")
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"secret": b"secret"}


def test_a_link_to_a_file_outside_is_not_read_and_only_the_link_is_removed(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "secret")
    store = LocalStore(str(tmp_path / "root"))
    for call in ("read", "download", "hash_file"):
        with pytest.raises(ShardError, match="behind a link"):
            CALLS[call](store, "link")
    store.write("link", b"1")  # replaces the link, not what it names
    assert store.read("link") == b"1"
    (tmp_path / "root/other").symlink_to(tmp_path / "secret")
    store.remove("other")
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_links_within_the_root_and_a_root_that_is_a_link_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    store = LocalStore(str(tmp_path / "root"))
    store.write("a/x", b"1")
    (tmp_path / "disk/b").symlink_to(tmp_path / "disk/a")
    assert store.read("b/x") == b"1"


@pytest.mark.parametrize("call", ["write", "upload", "create"])
def test_the_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_the_call_ends(
    call, tmp_path, monkeypatch
):
    events: list[str] = []

    def record(name: str) -> None:
        original = getattr(os, name)

        def recorded(first: int | Path, *rest: Path) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{first}")) if isinstance(first, int) else first
            events.append(f"{name} {'folder' if path.is_dir() else path.name[:7]}")
            original(first, *rest)

        monkeypatch.setattr(os, name, recorded)

    for name in ("fsync", "replace", "link"):
        record(name)
    CALLS[call](LocalStore(str(tmp_path)), "a/x")
    assert events == [
        "fsync .aside-",
        f"{'link' if call == 'create' else 'replace'} .aside-",
        "fsync folder",
    ]


def test_a_file_that_vanishes_while_a_folder_is_listed_is_no_error(tmp_path, monkeypatch):
    """As `.nfs` files do, and those of another job."""
    (tmp_path / "gone").write_bytes(b"1")
    (tmp_path / "kept").write_bytes(b"22")
    scandir = os.scandir

    def scan(path: Path) -> list[os.DirEntry[str]]:
        entries = list(scandir(path))
        (tmp_path / "gone").unlink(missing_ok=True)
        return entries

    (tmp_path / "folder").symlink_to(tmp_path)
    monkeypatch.setattr(os, "scandir", scan)
    assert LocalStore(str(tmp_path)).sizes("folder") == {"kept": 2}
