"""What an alignment method is: a way to match positions, and a vocabulary map.

The methods stand in `rayfuse/align/methods/`, one module each with a `METHOD`. They are registered
in `rayfuse.config.align.METHODS`.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from rayfuse.align.inside_map import InsideMap, build_inside_map
from rayfuse.align.matches import Matches
from rayfuse.align.token_spans import PlacedTokens, TokenBytes, list_token_bytes
from rayfuse.align.vocab_map import VocabMaps, build_maps
from rayfuse.config.align import METHODS
from rayfuse.config.models import ModelSettings
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.storage.dataset import DataSet

IdMap = Int[np.ndarray, " source_vocab"]
"""Target id of each source id; -1 for the tail."""


@dataclass(frozen=True)
class MapInputs:
    """What a stored vocabulary map may be computed from. It is sent to Ray tasks."""

    source: ModelSettings
    target: ModelSettings
    corpus: DataSet
    is_chat: bool = False
    """The corpus are conversations."""


@dataclass(frozen=True)
class StoredMap:
    """How a vocabulary map is computed in parallel: parts in Ray tasks, merged in the driver."""

    list_parts: Callable[[MapInputs], Sequence[Any]]
    """List the arguments of the tasks, about a second of one core each."""
    compute_part: Callable[[MapInputs, Any], Any]
    """Compute one part, in a Ray task."""
    merge: Callable[[Sequence[Any]], Any]
    """Merge results of parts, and results of merging, in any order; none for a start."""
    finish: Callable[[MapInputs, Any], IdMap]
    """Turn the merged result into the map."""
    unit: str
    """What the progress bar counts."""


@dataclass(frozen=True)
class Method:
    """One alignment method."""

    match: Callable[[PlacedTokens, PlacedTokens, "Alignment"], Matches]
    """Find the target positions that learn from a source position: `match(source, target, ...)`."""
    build_map: Callable[[TextTokenizer, TextTokenizer], VocabMaps] | None = None
    """Map the source's vocabulary to the target's, in about a second; None with a `stored_map`."""
    stored_map: StoredMap | None = None
    map_matched: Callable[[Sequence[int], TextTokenizer, TextTokenizer], IdMap] | None = None
    """Map these source ids, for a method with a `match` that uses the map; None if it does not. A
    report on a text needs the map of the text's own tokens alone."""
    keeps_true_token: bool = True
    """The token that really comes next always keeps an entry, with its chain probability."""


@dataclass(frozen=True)
class Alignment:
    """All that aligning one source with the target needs, built once per pair."""

    source: TokenBytes
    target: TokenBytes
    maps: VocabMaps
    method: Method
    inside: InsideMap | None = None
    """With `align.inside_tokens`: what source tokens are to target positions inside them."""


def load_method(name: str) -> Method:
    """Import a registered method.

    Args:
        name: A key of `METHODS`, as the recipe's `align.method` was checked to be.
    """
    method = importlib.import_module(METHODS[name].module).METHOD
    assert (method.stored_map is None) == (METHODS[name].stored_map is None), name
    return method


def build_alignment(
    source: TextTokenizer,
    target: TextTokenizer,
    name: str = "bytes",
    maps: VocabMaps | None = None,
    *,
    inside_tokens: bool = False,
) -> Alignment:
    """Build all that a registered method needs to align a source with the target.

    Args:
        source: The source's tokenizer.
        target: The target's.
        name: The method.
        maps: The vocabulary maps, for a method that stores its map.
        inside_tokens: Also align positions inside source tokens (`align.inside_tokens`).
    """
    method = load_method(name)
    if maps is None:
        assert method.build_map is not None, f"{name} stores its map: give it"
        maps = method.build_map(source, target)
    inside = build_inside_map(source, target) if inside_tokens else None
    return Alignment(list_token_bytes(source), list_token_bytes(target), maps, method, inside)


def map_for_matching(
    method: Method,
    used_ids: Int[np.ndarray, " used"],
    source: TextTokenizer,
    target: TextTokenizer,
) -> VocabMaps:
    """Map as much of the vocabulary as `method.match` needs for a text with these source tokens."""
    plain = np.full(source.vocab_size, -1, dtype=np.int32)
    if method.map_matched is not None:
        plain[used_ids] = method.map_matched(used_ids.tolist(), source, target)
    return build_maps(plain, source, target)
