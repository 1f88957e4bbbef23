"""The identity of evaluation tasks: hashes of their definitions and data, and lm-eval's version."""

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.evaluate import TasksSettings
from rayfuse.models.file_hash import hash_file


def describe_tasks(settings: TasksSettings) -> dict[str, Any]:
    """List everything that decides a task's score besides the model and the task's name.

    A data set on the Hugging Face hub is identified by lm-eval's version alone.

    Raises:
        UserError: lm-eval is not installed, or a folder does not exist.
    """
    return {
        "folder": _hash_folder(settings.folder, "evaluate.tasks.folder"),
        "data": _hash_folder(settings.data, "evaluate.tasks.data"),
        "num_fewshot": settings.num_fewshot,
        "limit": settings.limit,
        "lm_eval": _find_version(),
    }


def _find_version() -> str:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.tasks needs lm-eval, which is not installed; "
            "`pip install rayfuse[tasks]` on every node, or remove evaluate.tasks"
        )
    return importlib.metadata.version("lm_eval")


def _hash_folder(folder: str | None, setting: str) -> str | None:
    """Hash the names and contents of all files below a folder, without Python's bytecode."""
    if folder is None:
        return None
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{setting} is {folder!r}, a folder that does not exist; check the path")
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    lines = [
        f"{path.relative_to(root).as_posix()}:{hash_file(path)}"
        for path in files
        if "__pycache__" not in path.parts
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
