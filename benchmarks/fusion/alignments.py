"""How each alignment method of the study maps two tokenizers: rayfuse's own, and older rules."""

from pathlib import Path

import pyarrow as pa

from benchmarks.fusion.plan import INSIDE_TOKENS, UNFINISHED, WHOLE_CHARACTERS
from benchmarks.fusion.stored import tokenizer_of
from benchmarks.fusion.units import Unit
from rayfuse.align.method import Alignment, build_alignment
from rayfuse.align.methods.cooccurrence import choose_most_matched, count_pairs
from rayfuse.align.methods.min_edit_distance import map_to_nearest
from rayfuse.align.token_spans import list_token_bytes
from rayfuse.align.vocab_map import (
    UNCHANGED,
    build_maps,
    find_unfinished,
    map_vocabulary,
)


def align_tokenizers(unit: Unit, out: Path, corpus: pa.Table) -> Alignment:
    """Align a source with the target by the method of an `aligned` unit."""
    method = unit.settings["method"]
    source = tokenizer_of(unit.needs["captured"].needs["model"].needs["tokenizer"], out)
    target = tokenizer_of(unit.needs["corpus"].needs["target"], out)
    name = "bytes" if method in (WHOLE_CHARACTERS, UNFINISHED, INSIDE_TOKENS) else method
    maps = None
    if name == "min_edit_distance":
        maps = build_maps(map_to_nearest(range(source.vocab_size), source, target), source, target)
    if name == "cooccurrence":
        unseen = map_vocabulary(source, target)[UNCHANGED, :-1]
        counted = count_pairs(corpus, list_token_bytes(source), list_token_bytes(target))
        maps = build_maps(choose_most_matched(counted, unseen), source, target)
    inside = method == INSIDE_TOKENS
    alignment = build_alignment(source, target, name, maps, inside_tokens=inside)
    if method == WHOLE_CHARACTERS:
        alignment.maps[:, :-1][
            :, [_ends_inside_character(token) for token in source.token_bytes]
        ] = -1
    if method == UNFINISHED:
        goals = target.list_by_bytes()
        for token_id, token in enumerate(spelled or b"" for spelled in source.token_bytes):
            begun = [goals[token[:n]] for n in range(len(token), 0, -1) if token[:n] in goals]
            if begun and find_unfinished(token) < len(token):
                alignment.maps[:, token_id] = begun[0]
    return alignment


def _ends_inside_character(spelled: bytes | None) -> bool:
    """Check that a token ends inside a character, so that more bytes of it must follow."""
    try:
        (spelled or b"").decode()
    except UnicodeDecodeError:
        return True
    return False
