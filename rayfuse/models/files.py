"""Read a model's files without loading its weights: identity, context length, configuration."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.models import BACKENDS, ModelSettings, SourceSettings, TrainedSettings
from rayfuse.models.adapter import identify_adapter
from rayfuse.models.config_file import (
    TEXT_KEYS,
    find_config,
    find_context,
    find_long_rope,
    find_text_part,
    read_config,
)
from rayfuse.models.file_hash import find_cache_folder, hash_file
from rayfuse.models.quantization import check_quantization
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from rayfuse.models.weight_files import list_weight_files

IGNORED_KEYS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of config.json that describe where a model comes from and how it is stored."""

SHOWN_IDS = 3


@dataclass(frozen=True)
class ModelFiles:
    """The identity and the limits of a model."""

    identity: str
    """Hash of all bytes of a folder that decide its predictions; id and commit of a hub model. With
    an adapter, the hash of both."""
    head_width: int
    """Logits per position; may exceed the tokenizer's vocabulary by padding."""
    context_tokens: int | None
    """Context length; None if config.json does not limit it."""
    num_bytes: int
    """Bytes of the weights; 1 for a hub model, whose weights are not downloaded to count them."""
    config: dict[str, Any]
    """The content of config.json."""


def load_recipe_tokenizer(settings: ModelSettings) -> TextTokenizer:
    """Load the tokenizer of a recipe's model; that of a model made from the target is the target's.

    Raises:
        UserError: As for `load_tokenizer`.
    """
    if isinstance(settings, TrainedSettings):
        settings = settings.target
    return load_tokenizer(settings.model, settings.revision, settings.trust_remote_code)


def check_model(settings: ModelSettings, max_tokens: int, *, role: str) -> ModelFiles:
    """Read a model's files and check that a run can use the model.

    Args:
        settings: The model.
        max_tokens: Maximum length of a row.
        role: `target` or the source's name, for errors.

    Raises:
        UserError: The model is missing, has no safetensors, has fewer logits than its tokenizer
            has ids, has a context shorter than `max_tokens`, or is quantised in a way that cannot
            be used here.
    """
    try:
        files = read_model_files(settings)
        check_quantization(settings, files.config)
        _check_ids(settings.model, load_recipe_tokenizer(settings), files.head_width)
    except ValueError as error:
        raise UserError(f"{role}: {error}") from error
    _check_backend(settings, find_long_rope(files.config), max_tokens)
    if files.context_tokens is not None and files.context_tokens < max_tokens:
        raise UserError(
            f"corpus.max_tokens is {max_tokens}, more than the context of {files.context_tokens} "
            f"tokens of {role} {settings.model!r}; use <= {files.context_tokens}"
        )
    return files


def _check_backend(settings: ModelSettings, long_rope: int | None, max_tokens: int) -> None:
    """Check that a source's engine scores each row as if it were alone.

    Raises:
        UserError: It would give short rows the position factors of long ones.
    """
    if not isinstance(settings, SourceSettings) or BACKENDS[settings.backend].keeps_long_rope:
        return
    if long_rope is not None and long_rope < max_tokens:
        raise UserError(
            f"source {settings.name}: backend {settings.backend} does not choose the LongRoPE "
            f"factors of {settings.model!r} by row, and corpus.max_tokens is {max_tokens}, more "
            f"than their boundary; use backend transformers, or max_tokens <= {long_rope}"
        )


def _check_ids(model: str, tokenizer: TextTokenizer, head_width: int) -> None:
    """Check that the head gives each id of the tokenizer a logit.

    Raises:
        UserError: It does not.
    """
    if tokenizer.vocab_size <= head_width:
        return
    beyond = [name for name in tokenizer.token_names[head_width:] if name]
    shown = ", ".join(repr(name) for name in beyond[:SHOWN_IDS])
    are_added = set(beyond) <= tokenizer.added_names
    remedy = (
        "these are added tokens, which the model was never trained on: remove them from "
        "added_tokens in tokenizer.json, or save the model after resize_token_embeddings"
        if are_added
        else "use the tokenizer of this model"
    )
    raise UserError(
        f"model is {model!r}, whose tokenizer has {tokenizer.vocab_size} ids but whose head gives "
        f"only {head_width} logits; without a logit are {len(beyond)} tokens ({shown}): {remedy}"
    )


def read_model_files(settings: ModelSettings) -> ModelFiles:
    """Read the files of a folder, or the config.json of a hub model.

    Raises:
        UserError: The folder or the hub id does not exist; a folder has no config.json, no
            safetensors, not all that its index names, or an adapter; config.json is not that of a
            causal LLM; or the setting `adapter` cannot be used.
    """
    names = ("model", "revision", "trust_remote_code", "adapter", "adapter_revision")
    return _read_files(tuple((name, getattr(settings, name)) for name in names))


@lru_cache(maxsize=16)
def _read_files(values: tuple[tuple[str, Any], ...]) -> ModelFiles:
    settings = ModelSettings(**dict(values))
    path = find_config(settings.model, settings.revision)
    config = read_config(settings)
    head_width = _find_head_width(path, config)
    if Path(settings.model).expanduser().is_dir():
        weights = list_weight_files(path.parent)
        identity = _identify_folder(path.parent, weights, settings.trust_remote_code)
        num_bytes = sum(file.stat().st_size for file in weights)
    else:
        # The hub's cache stores files under snapshots/COMMIT/. A branch may move; the commit, which
        # is a hash of all files, is fixed.
        identity, num_bytes = f"{settings.model}@{path.parent.name}", 1
    adapter = identify_adapter(settings)
    if adapter is not None:
        identity = hashlib.sha256(f"{identity}\n{adapter}".encode()).hexdigest()
    return ModelFiles(identity, head_width, find_context(config), num_bytes, config)


def forget_model_files() -> None:
    """Read folders again that this process has read before."""
    _read_files.cache_clear()


def check_tensors(settings: ModelSettings, *, role: str) -> None:
    """Check that a model folder holds exactly the tensors of its architecture; loads none.

    An adapter's tensors must fit it. A model that passed is not checked again with the same version
    of transformers. Tensors of the hub, of quantised models and of those with their own code are
    checked as they are loaded.

    Args:
        settings: The model.
        role: `target` or the source's name, for errors.

    Raises:
        UserError: A tensor is missing, has another shape, or has no use, a file is corrupt, or the
            model is no causal LLM with a linear head.
    """
    is_folder = Path(settings.model).expanduser().is_dir()
    if not is_folder and settings.trust_remote_code:
        return
    name = f"{read_model_files(settings).identity}-{version('transformers')}"
    folder = find_cache_folder()
    passed = None if folder is None else folder / "complete" / name
    if passed is not None and passed.exists():
        return
    architecture = import_architecture()
    check = architecture.compare_tensors if is_folder else architecture.check_architecture
    try:
        check(settings)
    except UserError as error:
        raise UserError(f"{role}: {error}") from error
    if passed is not None:
        with suppress(OSError):  # not remembered: the next run checks again
            passed.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            passed.touch()


def import_architecture() -> Any:
    """Import what needs torch and transformers: that takes seconds, and is seldom needed."""
    from rayfuse.models import architecture

    return architecture


def _find_head_width(path: Path, config: dict[str, Any]) -> int:
    """Find the number of logits: as config.json states, or else its family's default.

    Raises:
        UserError: Neither gives one.
    """
    given = (config | find_text_part(config)).get("vocab_size")
    if given is None:
        given = import_architecture().find_default_width(config)
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise UserError(
            f"{path}: vocab_size is {given!r}, also in its part for text ({', '.join(TEXT_KEYS)}); "
            "a causal LLM has a number of tokens > 0 there: use the config.json of one"
        )
    return given


def find_difference(ours: ModelFiles, theirs: ModelFiles) -> str | None:
    """Find a reason in two models' configs why their weights cannot be averaged; None without one.

    Their tokenizers are not compared.
    """
    keys = ours.config.keys() | theirs.config.keys()
    reasons: list[tuple[bool, str]] = []
    for key in ["model_type", *sorted(filter(_affects_weights, keys))]:
        own, other = ours.config.get(key), theirs.config.get(key)
        if own != other:
            reasons.append((own is None or other is None, f"its {key} is {other!r}, not {own!r}"))
    # A key that both give explains more than one that a config leaves to its family's default.
    return min(reasons, key=lambda reason: reason[0])[1] if reasons else None


def _affects_weights(key: str) -> bool:
    """Check if a key of config.json determines which weights exist or how they are used."""
    is_irrelevant = key in IGNORED_KEYS or key.endswith("_token_id") or key == "use_cache"
    return not is_irrelevant and "dropout" not in key and not key.endswith("pdrop")


def _identify_folder(folder: Path, weights: list[Path], runs_code: bool) -> str:
    """Hash everything in a model folder that decides the model's predictions.

    Args:
        folder: The folder.
        weights: The files that it is loaded from.
        runs_code: Whether the folder's own code is run; then it counts.
    """
    stored = sorted(folder.glob("*.safetensors"))
    lines = [f"{file.name}:{hash_file(file)}" for file in [folder / "config.json", *stored]]
    if weights != stored:
        lines += [f"loaded:{file.name}" for file in weights]
    if runs_code:
        code = sorted(folder.rglob("*.py"))
        lines += [f"{file.relative_to(folder).as_posix()}:{hash_file(file)}" for file in code]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
