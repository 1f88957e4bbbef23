"""Fingerprints: short hashes of everything that decides a result, one function for each stage.

A folder is named by its fingerprint, so that results of other settings are never mixed with it.
"""

import hashlib
import json
import posixpath
from collections.abc import Iterable
from typing import Any

from rayfuse.config.align import AlignSettings
from rayfuse.config.models import SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.models.files import ModelFiles
from rayfuse.run.inputs import InputFile

FINGERPRINT_VERSION = 4
"""Increased when the same settings compute another result. A renamed setting or column is no
reason: it would make every captured data set useless (`rayfuse migrate` renames in place)."""

IMPORT_VERSION = 2
"""Increased when a store of another tool is imported as other rows than before."""

_FIRST_NAMES = {"min_edit_distance": "mined", "cooccurrence": "statistics"}
"""Renamed values of settings, with the names that fingerprints were first computed from."""


def fingerprint_of(**parts: Any) -> str:
    """Hash plain JSON values into 12 hexadecimal digits, independent of their order."""
    text = json.dumps(parts | {"schema_version": FINGERPRINT_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe_split(
    recipe: Recipe, inputs: Iterable[list[InputFile]], held_out_share: float
) -> dict[str, Any]:
    """List what decides how documents are split into rows, apart from the tokenizers.

    Args:
        recipe: Its corpus settings count.
        inputs: The files of each entry of `documents`.
        held_out_share: Share of the documents that the other data set gets.
    """
    settings = recipe.corpus.dump_result_settings()
    del settings["documents"]  # the files that were found stand for them
    return settings | {
        "held_out_share": held_out_share,
        "inputs": [
            [
                files[0].settings.dump_result_settings(),
                [_describe_file(file) for file in files],
            ]
            for files in inputs
        ],
    }


def _describe_file(file: InputFile) -> list[Any]:
    """List what identifies a file; its name only where it is more than the end of the path."""
    usual = file.path if file.format == "dataset" else posixpath.basename(file.path)
    names = [] if file.name == usual else [file.name]
    return [file.path, file.num_bytes, file.version, *names]


def fingerprint_captured(
    recipe: Recipe, source: SourceSettings, files: ModelFiles, *, tokenizer: str, rows: str
) -> str:
    """Hash what decides the captured rows of one source.

    Args:
        recipe: Its capture settings count.
        source: The source.
        files: The source's files.
        tokenizer: The source's tokenizer, by its hash.
        rows: The segmentation of the corpus, by its fingerprint.
    """
    return fingerprint_of(
        rows=rows,
        model=files.identity,
        dtype=source.dtype,
        backend=source.backend,
        tokenizer=tokenizer,
        top_k=recipe.capture.kept_entries,
        draws=recipe.capture.num_draws,
    )


def fingerprint_imported(
    recipe: Recipe, source: SourceSettings, *, tokenizer: str, rows: str
) -> str:
    """Hash what decides the captured rows of a source that is imported: its model does not.

    The store counts by its path: once it is imported, it is not needed any more.

    Args:
        recipe: Its capture settings count.
        source: The source.
        tokenizer: The source's tokenizer, by its hash.
        rows: The segmentation of the corpus, by its fingerprint.
    """
    return fingerprint_of(
        rows=rows,
        imported=[source.captured_from, source.captured_aligned],
        rules=IMPORT_VERSION,
        tokenizer=tokenizer,
        top_k=recipe.capture.kept_entries,
    )


def fingerprint_aligned(
    captured: str, settings: AlignSettings, *, target_tokenizer: str, version: int
) -> str:
    """Hash what decides the aligned rows of one source.

    Args:
        captured: The source's captured rows, by their fingerprint.
        settings: How it is aligned.
        target_tokenizer: The target's tokenizer, by its hash.
        version: Of the alignment's code.
    """
    values = settings.dump_result_settings()
    method = _FIRST_NAMES.get(settings.method, settings.method)
    return fingerprint_of(
        **values | {"method": method}, of=captured, target=target_tokenizer, rules=version
    )


def fingerprint_map(tokenizers: list[str], *, text: str | None, method: str, version: int) -> str:
    """Hash what decides a stored vocabulary map.

    Args:
        tokenizers: Hashes of the source's tokenizer and of the target's.
        text: The corpus, by its fingerprint, if the method counts tokens in it.
        method: `align.method`.
        version: Of the alignment's code.
    """
    return fingerprint_of(
        method=_FIRST_NAMES.get(method, method), pair=tokenizers, text=text, rules=version
    )


def fingerprint_training(
    recipe: Recipe,
    target: ModelFiles,
    *,
    corpus: str,
    held_out: str,
    aligned: list[str] | None,
) -> str:
    """Hash what decides the weights of a trained target.

    Args:
        recipe: Its settings of training and fusion count, and its seed.
        target: The target's files.
        corpus: The corpus, by its fingerprint.
        held_out: The held-out rows, by their fingerprint; they count if they choose the weights.
        aligned: The aligned rows of each source, by their fingerprints; None without fusion.
    """
    common: dict[str, Any] = {
        "corpus": corpus,
        "target": [target.identity, recipe.target.dtype],
        "seed": recipe.seed,
        "train": recipe.train.dump_result_settings(with_fusion=aligned is not None),
    }
    if recipe.train.publish == "best":
        common["held_out"] = held_out
    if aligned is None:
        return fingerprint_of(**common)
    return fingerprint_of(**common, aligned=aligned, fuse=recipe.fuse.dump_result_settings())
