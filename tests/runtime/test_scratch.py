"""Temporary folders: gone in the end, and after a kill gone when the next process needs one."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rayfuse.runtime.scratch import claim_scratch, name_scratch, remove_abandoned, scratch_folder

HOLD = """
import sys, time
from rayfuse.runtime.scratch import claim_scratch, name_scratch
folder = name_scratch("held")
lock = claim_scratch(folder)
(folder / "weights").write_bytes(b"x")
print(folder, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # so that it is read again
    return tmp_path


@pytest.fixture
def held(own_place):
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().decode().strip())
        process.kill()


def test_a_folder_is_removed_in_the_end(own_place):
    with scratch_folder("model") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "sub").mkdir()
    assert not any(own_place.iterdir())


def test_a_folder_in_use_is_kept_and_that_of_a_killed_process_is_removed(held, own_place):
    process, folder = held
    with scratch_folder("model"):
        assert (folder / "weights").exists()
    process.kill()
    process.wait()
    assert (folder / "weights").exists()
    with scratch_folder("model"):
        assert not folder.exists()


def test_the_next_attempt_takes_over_the_folder_of_a_process_that_lingers(held):
    _, folder = held
    lock = claim_scratch(folder)
    assert not any(folder.iterdir())
    os.close(lock)


def test_foreign_folders_and_links_are_left_alone(own_place):
    foreign = own_place / "rayfuse-private-0"
    foreign.mkdir()
    link = name_scratch("link")
    link.symlink_to(foreign)
    other = own_place / f"rayfuse-scratch-another.node-{os.getuid()}-x"
    other.mkdir()
    (foreign / "file").write_text("kept")
    remove_abandoned()
    assert (foreign / "file").exists()
    assert link.is_symlink()
    assert other.exists()
