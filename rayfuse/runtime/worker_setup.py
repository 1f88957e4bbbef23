"""Set up a Ray worker process of a run, before it imports anything else."""

import os
from contextlib import suppress

from rayfuse.runtime.environment import provide_cache_folders
from rayfuse.runtime.logging import set_up_worker_logs

DRIVER_FOLDER = "RAYFUSE_DRIVER_FOLDER"
"""The variable with the driver's working folder."""

WORKER_FOLDER = "RAYFUSE_WORKER_FOLDER"
"""The variable with the folder that a worker has entered."""


def set_up_worker() -> None:
    """Enable the log, provide caches, and enter the driver's folder; Ray calls this by name.

    Relative paths of a recipe (models, documents, tasks) are then the same files as for the driver,
    on each node that has the folder.
    """
    set_up_worker_logs()
    provide_cache_folders()
    with suppress(OSError):  # the node may share only the storage with the driver
        os.chdir(os.environ.get(DRIVER_FOLDER, "."))
    os.environ[WORKER_FOLDER] = os.getcwd()


def return_to_folder() -> None:
    """Enter the worker's folder again: Ray Train moves its workers to folders of its own."""
    os.chdir(os.environ.get(WORKER_FOLDER, "."))
