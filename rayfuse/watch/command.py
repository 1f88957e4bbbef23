"""The command: read the run once, serve its page, open the browser, until it is interrupted."""

import os
import sys
import webbrowser

from rich.console import Console

from rayfuse.config.recipe import Recipe
from rayfuse.watch.server import LiveRun, WatchServer
from rayfuse.watch.snapshot import RunReader

LOCAL_SECONDS, REMOTE_SECONDS = 5.0, 20.0
"""Between two reads of a folder, and of object storage, whose requests have a price."""


def open_server(recipe: Recipe, port: int) -> WatchServer:
    """Read a run once, and bind the port of its page; serves nothing yet.

    Args:
        recipe: The run's recipe.
        port: 0 for any free one.

    Raises:
        UserError: The recipe or the port cannot be used, or the storage has another schema version.
    """
    reader = RunReader(recipe)
    is_local = reader.layout.store.is_local
    live = LiveRun(reader.read, LOCAL_SECONDS if is_local else REMOTE_SECONDS)
    live.refresh()
    return WatchServer(live, port)


def watch_recipe(recipe: Recipe, console: Console, *, port: int, open_browser: bool) -> None:
    """Serve the page of a run until the process is interrupted.

    Args:
        recipe: The run's recipe.
        console: Where the page's address is printed.
        port: 0 for any free one.
        open_browser: Open the page in a browser, where there is a desktop.

    Raises:
        UserError: As for `open_server`.
    """
    with open_server(recipe, port) as server:
        console.print(f"watching {server.run.refresh()[0].root} at {server.address}")
        console.print("Ctrl-C ends it; the run does not notice")
        if open_browser and has_desktop():
            webbrowser.open(server.address)
        server.serve_forever()


def has_desktop() -> bool:
    """Check for a desktop: without one, a browser of text would take the terminal."""
    if sys.platform != "linux":
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
