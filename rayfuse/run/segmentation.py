"""The segmentation of documents into rows: stored once, and reused by later recipes.

Rows are split to fit every tokenizer of a recipe, so that another source or target would change
the rows and make all captured shards useless. The first segmentation that something is computed
from is therefore recorded, and later recipes over the same documents reuse it.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.chat import identify_format, load_chat_format
from rayfuse.run.fingerprint import fingerprint_of
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import decode_run
from rayfuse.storage.seal import REMEDY, ShardError, seal, unseal
from rayfuse.storage.store import Store

RECORD_FILE = re.compile(r"(?:held-out-)?segmentation-[0-9a-f]{12}\.json")


@dataclass(frozen=True)
class Segmentation:
    """How the documents of a data set are split into rows."""

    fingerprint: str
    """Hash of the documents and of all that decides the row boundaries."""
    record_file: str
    """Where the first segmentation of these documents is recorded."""
    split_for: tuple[ModelSettings, ...]
    """The models with the tokenizers that the rows fit."""
    tokenizers: tuple[str, ...]
    """Hashes of these tokenizers."""
    is_reused: bool
    """Whether the rows were split for another recipe's models."""
    is_chat: bool = False
    """Whether the documents are conversations, so that chat templates count."""

    def check_tokenizers(self) -> None:
        """Check that the tokenizers are still those that the rows were first split for.

        Raises:
            UserError: A tokenizer is missing or has changed.
        """
        remedy = "restore it, or set corpus.resplit: true, which captures every source again"
        for model, recorded in zip(self.split_for, self.tokenizers, strict=True):
            try:
                found = identify_format(model, is_chat=self.is_chat)
            except UserError as error:
                raise UserError(
                    f"the rows were first split for another model: {error}; {remedy}"
                ) from error
            if found != recorded:
                raise UserError(
                    f"the rows were first split for {model.model!r}, and its tokenizer has "
                    f"changed; {remedy}"
                )


def plan_segmentation(
    store: Store,
    name: str,
    documents: dict[str, Any],
    models: tuple[ModelSettings, ...],
    *,
    resplit: bool,
    is_chat: bool = False,
) -> Segmentation:
    """Choose how documents are split: as first recorded, else to fit the models of this recipe.

    Args:
        store: The store of the run.
        name: The data set's name within the corpus stage: empty, or `held-out`.
        documents: The documents and all settings of the split, apart from the tokenizers.
        models: The models of the recipe, the target first.
        resplit: Split them for these models even if another segmentation is recorded.
        is_chat: The documents are conversations.

    Raises:
        ShardError: The record of an earlier segmentation is corrupt.
        UserError: A stored corpus has another schema version.
    """
    target = identify_format(models[0], is_chat=is_chat)
    prefix = f"{name}-" if name else ""
    record_file = f"corpus/{prefix}segmentation-{fingerprint_of(**documents)}.json"
    own = _split_for(models, documents, record_file, is_chat=is_chat)
    if store.sizes(place_rows(store, name, own.fingerprint, target).folder, "run.json"):
        return own
    if not store.sizes("corpus", record_file.removeprefix("corpus/")):
        _check_versions(store)
    if resplit:
        return own
    recorded = _read_record(store, record_file, is_chat=is_chat)
    if recorded is None or recorded.fingerprint == own.fingerprint:
        return own
    return recorded


def place_rows(store: Store, name: str, segmentation: str, target_tokenizer: str) -> DataSet:
    """Name the data set of rows that are stored in the target's tokens.

    Args:
        store: The store of the run.
        name: As for `plan_segmentation`.
        segmentation: Its fingerprint.
        target_tokenizer: The hash of the target's tokenizer.
    """
    fingerprint = fingerprint_of(rows=segmentation, target=target_tokenizer)
    return DataSet(store, "corpus", name, fingerprint)


def write_segmentation(store: Store, segmentation: Segmentation) -> None:
    """Record how documents are split, unless a segmentation of them is recorded already."""
    record = {
        "rows": segmentation.fingerprint,
        "cut_for": [
            {"model": model.model, "revision": model.revision}
            | ({"chat_template": load_chat_format(model).template} if segmentation.is_chat else {})
            for model in segmentation.split_for
        ],
        "tokenizers": list(segmentation.tokenizers),
    }
    # A conditional PUT: of two recipes that start at once, one records and the other must reuse.
    store.create(segmentation.record_file, seal(record))


def _split_for(
    models: tuple[ModelSettings, ...], documents: dict[str, Any], record_file: str, *, is_chat: bool
) -> Segmentation:
    by_hash = {identify_format(model, is_chat=is_chat): model for model in models}
    tokenizers = sorted(by_hash)
    return Segmentation(
        fingerprint=fingerprint_of(**documents, tokenizers=tokenizers),
        record_file=record_file,
        split_for=tuple(by_hash[tokenizer] for tokenizer in tokenizers),
        tokenizers=tuple(tokenizers),
        is_reused=False,
        is_chat=is_chat,
    )


def _check_versions(store: Store) -> None:
    """Check that no corpus has another schema version.

    Its segmentation would have another file name, so that the documents would be split again.

    Raises:
        UserError: A corpus has another version; the message names the migration.
    """
    for folder in store.folders("corpus"):
        # A corrupt record is no reason to refuse: it may belong to another recipe's corpus.
        with suppress(FileNotFoundError, ShardError):
            path = f"corpus/{folder}/run.json"
            decode_run(store.read(path), f"{store.root}/{path}", store.root)


def _read_record(store: Store, record_file: str, *, is_chat: bool = False) -> Segmentation | None:
    try:
        record = unseal(store.read(record_file), f"{store.root}/{record_file}")
        return Segmentation(
            fingerprint=record["rows"],
            record_file=record_file,
            # Only a recipe may allow a model to run its own code (trust_remote_code): the record
            # may come from a storage that others can write.
            split_for=tuple(ModelSettings.model_validate(model) for model in record["cut_for"]),
            tokenizers=tuple(record["tokenizers"]),
            is_reused=True,
            is_chat=is_chat,
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{store.root}/{record_file} is corrupt ({error}); {REMEDY}") from error


def find_corrupt_records(store: Store) -> Iterator[tuple[str, str]]:
    """Yield the records of segmentations that are corrupt, each with the reason.

    Any recipe over the same documents reads them, also before its own folders have names.
    """
    for file in store.sizes("corpus"):
        if RECORD_FILE.fullmatch(file):
            try:
                _read_record(store, f"corpus/{file}")
            except ShardError as error:
                yield f"corpus/{file}", str(error)
