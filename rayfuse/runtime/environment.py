"""Prepare the environment and the private folder of a process, before libraries read them."""

import os
import secrets
import stat
import sys
import tempfile
from pathlib import Path

from rayfuse.config.base import UserError

MAX_FOLDER_BYTES = 43
"""Of the folder of a Ray cluster: the path of a socket has at most 107 bytes, and Ray's part 64."""

CACHE_FOLDERS = {
    "XDG_CACHE_HOME": ".",
    "MPLCONFIGDIR": "matplotlib",
    "NUMBA_CACHE_DIR": "numba",
    "TRITON_HOME": "triton",
}
"""Variables that move the caches of libraries out of the home folder: where each then is."""


def prepare_environment() -> None:
    """Set what libraries read when they are imported; call it first in the driver.

    Raises:
        UserError: There is no home folder, and none can be made in its place.
    """
    if not os.environ.get("RAY_ADDRESS"):
        prepare_own_cluster()
    provide_cache_folders()


def prepare_own_cluster() -> None:
    """Make a Ray cluster that this process starts private, if ray is imported later.

    It demands a random token that only this process knows, from no file. All its ports listen on
    loopback: what binds them to the node's address is that Ray takes a node for one of several,
    and this variable, for other systems, is its only switch.

    If ray is imported already, nothing is changed: its compiled part has read the environment, and
    would not know the token that the cluster demands.
    """
    if "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def provide_cache_folders() -> None:
    """Move the caches of libraries into the private folder if the home cannot be written.

    If there is no home at all, the private folder is it: libraries look for more than caches there.

    Raises:
        UserError: As for `open_private_folder`.
    """
    home = os.path.expanduser("~")  # not Path.home(): it raises for a user without an entry
    if os.path.isdir(home) and os.access(home, os.W_OK):
        return
    private = open_private_folder()
    if not os.path.isdir(home):
        os.environ["HOME"] = str(private)
    caches = private / "cache"
    for name, folder in CACHE_FOLDERS.items():
        os.environ.setdefault(name, str(caches / folder))


def open_private_folder() -> Path:
    """Create this user's own folder for temporary files, or check the one that exists.

    Raises:
        UserError: It cannot be created, or another user could change it.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    folder = base / f"rayfuse-private-{os.geteuid()}"
    remedy = "set RAY_TMPDIR to a folder that only this user can write, or to /tmp"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found, above = folder.lstat(), base.stat()
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}); {remedy}") from error
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(
            f"{folder} is not a folder of this user alone (mode 700); remove it, or {remedy}"
        )
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise UserError(f"in {base} all users can replace folders of others; {remedy}")
    return folder


def open_cluster_folder() -> Path:
    """Name the folder for a Ray cluster of this process: its sessions, sockets and logs.

    It is within the private folder, as Ray opens its own folder to all users.

    Raises:
        UserError: As for `open_private_folder`, or its path is too long for Ray's sockets.
    """
    folder = open_private_folder() / "ray"
    num_bytes = len(os.fsencode(folder))
    if num_bytes > MAX_FOLDER_BYTES:
        raise UserError(
            f"the folder of temporary files, {folder}, has {num_bytes} bytes in its path; Ray's "
            f"sockets allow {MAX_FOLDER_BYTES}: set RAY_TMPDIR to a shorter one, such as /tmp"
        )
    return folder
