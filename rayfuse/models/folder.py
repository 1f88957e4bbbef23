"""The folder of a model: which of its files count, and how JSON in it is read."""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import huggingface_hub  # imports its parts when they are used

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.config.models import ModelSettings

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Patterns of the files of a tokenizer, chat templates included."""

TEMPLATE_FILE = "chat_template.jinja"
"""The chat template of a model folder, if it is not in tokenizer_config.json."""

PLAIN_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*")
"""Patterns of a model's files besides its weights."""

HUB_REMEDIES = {
    "GatedRepoError": "accept its terms on the hub, with the account of the token in HF_TOKEN",
    "RevisionNotFoundError": "check revision",
    "RepositoryNotFoundError": "check the name; if the model is private, set HF_TOKEN",
    "LocalEntryNotFoundError": "give a local folder, or connect to the hub without HF_HUB_OFFLINE",
}
"""By the name of the hub client's error, which is imported only if it is raised."""

MAX_JSON_BYTES = 2**24
"""The largest config.json and index that is read; those of the largest LLMs have 2^23 bytes."""


def check_folder(model: str, *, setting: str = "model") -> None:
    """Check that a model that looks like a path is a folder, as a hub id is NAME or OWNER/NAME.

    Args:
        model: A folder or a hub id.
        setting: The setting that names it, for errors.

    Raises:
        UserError: The folder does not exist.
    """
    folder = Path(model).expanduser()
    is_path = folder.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1
    if is_path and "://" not in model and not folder.is_dir():
        raise UserError(f"{setting} is {model!r}, a folder that does not exist; check the path")


def find_folder(
    model: str, revision: str | None, patterns: tuple[str, ...], *, setting: str = "model"
) -> Path:
    """Find the folder of a model's files; downloads those of a hub model first.

    Args:
        model: A folder or a hub id.
        revision: A commit, branch or tag of the hub; None for its default branch.
        patterns: The files that are downloaded.
        setting: The setting that names it, for errors.

    Raises:
        UserError: The folder does not exist, or the hub refuses.
    """
    check_folder(model, setting=setting)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    with naming_hub_model(model, setting=setting):
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=list(patterns)
            )
        )


def naming_hub_model(model: str, *, setting: str = "model") -> AbstractContextManager[None]:
    """Turn any error of the hub's client into a `UserError` that names the model."""
    return user_error_from(
        lambda error: UserError(
            f"{setting} is {model!r}, which is not a local folder and cannot be read from the hub "
            f"({first_line(error)}); {_find_hub_remedy(error)}"
        )
    )


def _find_hub_remedy(error: BaseException | None) -> str:
    """Find the remedy of an error of the hub's client, by its class or by that of its cause."""
    while error is not None:
        for kind in type(error).__mro__:
            if kind.__name__ in HUB_REMEDIES:
                return HUB_REMEDIES[kind.__name__]
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            return "renew HF_TOKEN, which the hub refuses, or unset it"
        error = error.__cause__ or error.__context__
    return "check the name and the connection to the hub"


def list_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """List the files of a folder that match any of the patterns, each one time, sorted."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def copy_files(source: Path, destination: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of a model folder that match any of the patterns, byte for byte.

    Raises:
        UserError: A file is a link to a place outside of the model: its content would be published.
    """
    root = source.resolve()
    if root.parent.name == "snapshots":  # the hub's cache, whose files are links to ../../blobs
        root = root.parent.parent
    for file in list_files(source, patterns):
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{file} is a link to a file outside of the model; copy the file there")
        copy = destination / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def copy_tokenizer(settings: ModelSettings, destination: Path) -> None:
    """Copy the files of a model's tokenizer, and the chat template that the recipe names.

    Raises:
        UserError: As for `find_folder` and `copy_files`.
    """
    own = find_folder(settings.model, settings.revision, TOKENIZER_FILES)
    copy_files(own, destination, TOKENIZER_FILES)
    given = settings.chat_template
    if given is not None and is_inline_template(given):
        (destination / TEMPLATE_FILE).write_text(given, encoding="utf-8")
    elif given is not None:
        shutil.copyfile(Path(given).expanduser(), destination / TEMPLATE_FILE)


def is_inline_template(chat_template: str) -> bool:
    """Check if the setting is a template itself, and not the path of one."""
    return "{{" in chat_template or "{%" in chat_template


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        UserError: It is missing, too large, no UTF-8, no JSON, or another value than an object.
    """
    with user_error_from(
        lambda error: UserError(
            f"{path} is corrupt or not a file of a model ({first_line(error)}); save it again with "
            "save_pretrained, or download it again"
        )
    ):
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes, more than {MAX_JSON_BYTES}")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found a {type(value).__name__}")
        return value
