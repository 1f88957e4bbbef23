"""Rows that are cut once and kept: models that come later are shown the same rows.

Rows are cut to fit every tokenizer of a recipe, so that another source or target would cut them
anew and make all that is captured useless. The first cut that something is computed from is
therefore written down, and recipes over the same documents keep to it.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rayfuse.config.models import ModelSettings
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.run.fingerprint import fingerprint_of
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import ShardError, decode_run
from rayfuse.storage.store import Store


@dataclass(frozen=True)
class Segmentation:
    """How the documents of a data set are cut."""

    fingerprint: str
    """Hash of the documents and of all that decides on the cuts."""
    record_file: str
    """Where the first cut of these documents is written down."""
    cut_for: tuple[ModelSettings, ...]
    """The models whose tokenizers the rows fit."""
    tokenizers: tuple[str, ...]
    """Hashes of these."""
    is_reused: bool
    """They are cut for another recipe's models."""

    def check_tokenizers(self) -> None:
        """Check that the tokenizers are still those that the rows were first cut for.

        Raises:
            ValueError: One is gone or has changed.
        """
        remedy = "bring it back, or set corpus.recut: true, which captures every source again"
        for model, known in zip(self.cut_for, self.tokenizers, strict=True):
            try:
                found = load_recipe_tokenizer(model).content_hash
            except ValueError as error:
                raise ValueError(
                    f"the rows were first cut for another: {error}; {remedy}"
                ) from error
            if found != known:
                raise ValueError(
                    f"the rows were first cut for {model.model!r}, whose tokenizer has changed; "
                    f"{remedy}"
                )


def plan_segmentation(
    store: Store,
    name: str,
    documents: dict[str, Any],
    models: tuple[ModelSettings, ...],
    *,
    recut: bool,
) -> tuple[DataSet, Segmentation]:
    """Return the data set of a recipe's rows, in its target's tokens, and how they are cut.

    Args:
        store: Where rows are kept.
        name: The data set's name within the corpus stage: empty, or `held-out`.
        documents: The documents and the settings of the cut, but for tokenizers.
        models: The recipe's, the target first.
        recut: Cut them for these models, whatever there is.

    Raises:
        ValueError: The record of an earlier cut is damaged.
    """
    target = load_recipe_tokenizer(models[0]).content_hash
    prefix = f"{name}-" if name else ""
    record_file = f"corpus/{prefix}segmentation-{fingerprint_of(**documents)}.json"
    own = _cut_for(models, documents, record_file)
    data = _place(store, name, own.fingerprint, target)
    if recut or store.sizes(data.folder, "run.json"):
        return data, own
    kept = _read_kept(store, record_file)
    if kept is None:
        _check_versions(store)
    if kept is None or kept.fingerprint == own.fingerprint:
        return data, own
    return _place(store, name, kept.fingerprint, target), kept


def write_segmentation(store: Store, rows: Segmentation) -> None:
    """Write down how documents are cut, unless a cut of them is written down already."""
    record = {
        "rows": rows.fingerprint,
        "cut_for": [{"model": model.model, "revision": model.revision} for model in rows.cut_for],
        "tokenizers": rows.tokenizers,
    }
    store.create(rows.record_file, json.dumps(record, indent=1).encode())


def _cut_for(
    models: tuple[ModelSettings, ...], documents: dict[str, Any], record_file: str
) -> Segmentation:
    by_hash = {load_recipe_tokenizer(model).content_hash: model for model in models}
    tokenizers = sorted(by_hash)
    return Segmentation(
        fingerprint=fingerprint_of(**documents, tokenizers=tokenizers),
        record_file=record_file,
        cut_for=tuple(by_hash[tokenizer] for tokenizer in tokenizers),
        tokenizers=tuple(tokenizers),
        is_reused=False,
    )


def _check_versions(store: Store) -> None:
    """Check that no corpus has another schema version.

    Its segmentation would lie under another name, so that the documents would be cut again.

    Raises:
        UserError: A corpus has another version; the message names the migration.
    """
    for folder in store.folders("corpus"):
        # A corrupt record is no reason to refuse: it may belong to another recipe's corpus.
        with suppress(FileNotFoundError, ShardError):
            path = f"corpus/{folder}/run.json"
            decode_run(store.read(path), f"{store.root}/{path}", store.root)


def _place(store: Store, name: str, rows: str, target: str) -> DataSet:
    return DataSet(store, "corpus", name, fingerprint_of(rows=rows, target=target))


def _read_kept(store: Store, record_file: str) -> Segmentation | None:
    try:
        record = json.loads(store.read(record_file))
        return Segmentation(
            fingerprint=record["rows"],
            record_file=record_file,
            # Whether a model may run code of its own is for recipes to say, never for a storage.
            cut_for=tuple(ModelSettings.model_validate(model) for model in record["cut_for"]),
            tokenizers=tuple(record["tokenizers"]),
            is_reused=True,
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{store.root}/{record_file} is corrupt ({error}); remove it: the next run writes it "
            "again"
        ) from error
