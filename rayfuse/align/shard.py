"""CORPUS and CAPTURED rows of a shard -> its ALIGNED rows."""

import math

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.align.byte_nll import count_text_tokens, spread_nll
from rayfuse.align.distributions import find_renamed, map_entries, merge_entries, put_true_token
from rayfuse.align.inside_tokens import (
    InsidePositions,
    find_inside_positions,
    map_inside_tokens,
)
from rayfuse.align.matches import NO_SHARED_BOUNDARY, Matches, keep_one_to_one
from rayfuse.align.method import Alignment
from rayfuse.align.records import SLICE_POSITIONS, SourceRecords, check_entries, read_records
from rayfuse.align.token_spans import PlacedTokens, place_tokens
from rayfuse.align.vocab_map import UNCHANGED, VocabMaps
from rayfuse.schema import ALIGNED, INSIDE_TOKEN, codes, flags, halfs, ints
from rayfuse.storage.codec import (
    LOWEST_LOGPROB,
    EncodedTopK,
    TopK,
    build_list_column,
    decode_probs,
    encode_probs,
    flatten_column,
)

ALIGN_VERSION = 5
"""Increased when the same captured shards are aligned to other rows or maps, so that stored results
of older code are never reused.
2: `min_edit_distance` counts distances above 255 bytes; a row's NLL does not depend on the next
row (LOG.md).
3: tokens that share a character are placed by their bytes where a tokenizer normalizes its text.
4: a token that ends inside a character goes to the tail if the tokens after it may change the
target's.
5: a token without bytes at the start of a row counts for the bytes after it; a prefix space may
follow an added token; characters that the target's normalizer changes go to its own token.
"""

NOT_RECORDED = "source: not recorded"
"""The reason of positions without a match of which an imported store has no distribution."""

KNOWN_SHARE = 0.9
"""A row counts as known if the source's NLL of it is below this share of chance, ln V nats per
token. Random weights have 0.97 and more of it; knowing no more than token frequencies, about 0.7.
"""


def align_shard(
    corpus: pa.Table, captured: pa.Table, alignment: Alignment
) -> tuple[pa.Table, dict[str, float]]:
    """Align the rows of a shard, and sum up what reports need.

    The sums: `positions` (target positions that a token follows), `with_signal`, `one_to_one` (of
    these, the next token is one source token), `unmatched: REASON`, with `align.inside_tokens` also
    `inside_tokens` (of `with_signal`, inside a source token), and over the positions with a signal
    the mass outside the head, in the target's vocabulary (`tail_mass`) and before mapping
    (`captured_tail_mass`); the source's tokens in rows that it has scored (`scored_tokens`), and in
    those of them that it predicts better than chance (`known_tokens`).

    Raises:
        ValueError: The two tables do not hold the same rows, tokens are not those of the text, or
            an id is outside its vocabulary.
    """
    if corpus["row_id"].to_pylist() != captured["row_id"].to_pylist():
        raise ValueError("corpus and captured shard hold different rows; capture the shard again")
    texts = [text.encode() for text in corpus["text"].to_pylist()]
    target_ids, target_offsets = flatten_column(corpus, "target_ids")
    source_ids, source_offsets = flatten_column(captured, "token_ids")
    ends_document = corpus["ends_document"].to_pylist()
    target = place_tokens(target_ids, target_offsets, texts, alignment.target, ends_document)
    source = place_tokens(source_ids, source_offsets, texts, alignment.source, ends_document)
    records = read_records(captured)
    check_entries(records.top.ids, source_offsets, len(alignment.source.lengths))
    matches = drop_unrecorded(alignment.method.match(source, target, alignment), records)
    aligned = map_distributions(source, target, records, matches, alignment)
    inside = map_inside(source, target, records, alignment, aligned)
    target_at = np.concatenate([matches.target_at, inside.target_at])
    source_at = np.concatenate([matches.source_at, inside.source_at])
    columns = {
        "row_id": corpus["row_id"],
        "nats_per_byte": build_list_column(
            spread_nll(source, target, records), target_offsets, halfs
        ),
        "nats": captured["nats"],
        "num_tokens": count_text_tokens(source),
    } | _build_columns(aligned, target_at, target_offsets)
    schema = ALIGNED
    if alignment.inside is not None:
        columns[INSIDE_TOKEN.name] = _build_flags(inside.target_at, target_offsets)
        schema = ALIGNED.append(INSIDE_TOKEN)
    table = pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema)
    return table, {
        "positions": float(target.has_next.sum()),
        "with_signal": float(len(target_at)),
        "one_to_one": float(len(keep_one_to_one(matches, source, target).target_at)),
        "tail_mass": _sum_mass(aligned.tail_logprobs[target_at]),
        "captured_tail_mass": _sum_mass(records.top.tail_logprobs[source_at]),
    } | _count_known(table, len(alignment.source.lengths)) | _count_inside(
        alignment, len(inside.target_at), matches
    )


def drop_unrecorded(matches: Matches, records: SourceRecords) -> Matches:
    """Drop the matches without any entry: only sources that are imported have such positions."""
    if not records.head.ids.shape[1]:  # draws alone
        return matches
    has_entry = records.head.ids[matches.source_at, 0] >= 0
    return matches if has_entry.all() else matches.select(has_entry, NOT_RECORDED)


def _count_inside(alignment: Alignment, num_inside: int, matches: Matches) -> dict[str, float]:
    """Count the positions without a match by reason; with `align.inside_tokens`, those inside."""
    unmatched = dict(matches.unmatched)
    if num_inside:
        unmatched[NO_SHARED_BOUNDARY] -= num_inside
    counts = {f"unmatched: {reason}": float(count) for reason, count in unmatched.items() if count}
    return counts if alignment.inside is None else counts | {"inside_tokens": float(num_inside)}


def _build_flags(
    at: Int[np.ndarray, " positions"], offsets: Int[np.ndarray, " rows_plus_1"]
) -> pa.ListArray:
    is_set = np.zeros(offsets[-1], dtype=bool)
    is_set[at] = True
    return build_list_column(is_set, offsets, flags)


def _build_columns(
    aligned: EncodedTopK,
    target_at: Int[np.ndarray, " signals"],
    offsets: Int[np.ndarray, " rows_plus_1"],
) -> dict[str, pa.ListArray]:
    top_offsets = offsets * aligned.ids.shape[1]
    return {
        "has_signal": _build_flags(target_at, offsets),
        "top_ids": build_list_column(aligned.ids.reshape(-1), top_offsets, ints),
        "top_logprobs": build_list_column(aligned.codes.reshape(-1), top_offsets, codes),
        "tail_logprobs": build_list_column(aligned.tail_logprobs, offsets, halfs),
    }


def _count_known(aligned: pa.Table, vocab_size: int) -> dict[str, float]:
    """Count the source's tokens in rows that it has scored, and in rows that it knows."""
    nats, num_tokens = aligned["nats"].to_numpy(), aligned["num_tokens"].to_numpy()
    chance = num_tokens * math.log(vocab_size)
    return {
        "scored_tokens": float(num_tokens[np.isfinite(nats)].sum()),
        "known_tokens": float(num_tokens[nats < KNOWN_SHARE * chance].sum()),
    }


def _sum_mass(logprobs: Float[np.ndarray, " positions"]) -> float:
    return float(np.exp(logprobs.astype(np.float64)).sum())


def map_distributions(
    source: PlacedTokens,
    target: PlacedTokens,
    records: SourceRecords,
    matches: Matches,
    alignment: Alignment,
) -> EncodedTopK:
    """Map the matched source positions' distributions to target tokens, for every target position.

    Positions without a match have no entry.
    """
    num_tokens, top_k = len(target.ids), records.top.ids.shape[1]
    aligned = EncodedTopK(
        ids=np.full((num_tokens, top_k), -1, dtype=np.int32),
        codes=np.zeros((num_tokens, top_k), dtype=np.uint8),
        tail_logprobs=np.full(num_tokens, LOWEST_LOGPROB, dtype=np.float16),
    )
    for start in range(0, len(matches.target_at), SLICE_POSITIONS):
        part = matches.part(slice(start, start + SLICE_POSITIONS))
        _map_slice(source, target, records, part, alignment, aligned)
    return aligned


def _map_slice(
    source: PlacedTokens,
    target: PlacedTokens,
    records: SourceRecords,
    matches: Matches,
    alignment: Alignment,
    out: EncodedTopK,
) -> None:
    """Map some matches' distributions into `out`: copy those that are only renamed, compute others.

    Arrays of entries lie in memory entries first; see `distributions`.
    """
    target_at, source_at, until = matches.target_at, matches.source_at, matches.source_stop
    keeps_true_token = alignment.method.keeps_true_token
    true_ids = target.ids[target_at + 1]
    top_ids = records.top.ids[source_at].T.copy()
    is_first_piece = (top_ids == source.ids[source_at + 1]) & keeps_true_token
    target_space = target.next_has_prefix_space[target_at].astype(np.int8)
    space_changes = target_space - source.next_has_prefix_space[source_at]
    mapped_ids = _map_ids(top_ids, alignment.maps, space_changes)
    entry, at = np.nonzero(is_first_piece)
    renamed_ids = mapped_ids.copy()
    renamed_ids[entry, at] = true_ids[at]
    is_renamed = find_renamed(renamed_ids.T, top_ids.T >= 0) & (until == source_at + 1)
    is_renamed &= is_first_piece.any(axis=0) | (not keeps_true_token)
    # Where nothing but ids changes, the codes are copied: this saves decoding and encoding.
    copied_from, copied_to = source_at[is_renamed], target_at[is_renamed]
    out.ids[copied_to] = renamed_ids[:, is_renamed].T
    out.codes[copied_to] = records.top.codes[copied_from]
    out.tail_logprobs[copied_to] = records.top.tail_logprobs[copied_from]

    rest = np.flatnonzero(~is_renamed)
    source_at, target_at, true_ids = source_at[rest], target_at[rest], true_ids[rest]
    tails, rest_ids = records.top.tail_logprobs[source_at], top_ids[:, rest].T
    probs = decode_probs(records.top.codes[source_at].reshape(-1), rest_ids, tails)
    first_logprobs = records.next_logprobs[source_at]
    chain = records.log_totals[until[rest]] - records.log_totals[source_at]
    mapped = put_true_token(
        map_entries(TopK(rest_ids, probs, np.exp(tails.astype(np.float32))), mapped_ids[:, rest].T),
        is_first_piece=is_first_piece[:, rest].T,
        first_probs=np.exp(first_logprobs) * (keeps_true_token and not records.has_draws),
        continuation_probs=np.exp(np.minimum(chain - first_logprobs, 0.0)).astype(np.float32),
        true_ids=true_ids,
    )
    _write_top(merge_entries(mapped, true_ids), target_at, out)


def map_inside(
    source: PlacedTokens,
    target: PlacedTokens,
    records: SourceRecords,
    alignment: Alignment,
    out: EncodedTopK,
) -> InsidePositions:
    """Compute the distributions of positions inside source tokens into `out`.

    Returns:
        The positions that have one; none without `align.inside_tokens`.
    """
    none = InsidePositions(*np.zeros((3, 0), dtype=np.int64))
    if alignment.inside is None or not records.head.ids.size:
        return none
    kept = [none]
    for part, top in map_inside_tokens(
        find_inside_positions(source, target),
        source.ids,
        records.head,
        alignment.source,
        alignment.inside,
        num_entries=out.ids.shape[1],
    ):
        _write_top(top, part.target_at, out)
        kept.append(part)
    columns = zip(*(vars(part).values() for part in kept), strict=True)
    return InsidePositions(*(np.concatenate(arrays) for arrays in columns))


def _write_top(top: TopK, at: Int[np.ndarray, " positions"], out: EncodedTopK) -> None:
    out.ids[at] = top.ids
    out.codes[at] = encode_probs(top.probs).reshape(top.probs.shape)
    lowest = np.exp(np.float32(LOWEST_LOGPROB))
    out.tail_logprobs[at] = np.log(np.maximum(top.tail, lowest))


def _map_ids(
    top_ids: Int[np.ndarray, "entries positions"],
    maps: VocabMaps,
    space_changes: Int[np.ndarray, " positions"],
) -> Int[np.ndarray, "entries positions"]:
    """Map the ids of entries; `space_changes` chooses among the three maps at each position."""
    mapped_ids = maps[UNCHANGED][top_ids]
    differing = np.flatnonzero(space_changes)
    mapped_ids[:, differing] = maps[space_changes[differing], top_ids[:, differing]]
    return mapped_ids
