"""CORPUS and CAPTURED rows of a shard -> its ALIGNED rows."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, UInt8

from rayfuse.align.distributions import (
    TopEntries,
    find_renamed,
    map_entries,
    merge_entries,
    put_true_token,
)
from rayfuse.align.matches import Matches, keep_one_to_one, match_positions
from rayfuse.align.token_spans import PlacedTokens, TokenBytes, place_tokens
from rayfuse.align.vocab_map import PLAIN, VocabMaps
from rayfuse.schema import ALIGNED, codes, flags, halfs, ints
from rayfuse.storage.codec import (
    LOWEST_LOGPROB,
    build_list_column,
    decode_probs,
    encode_probs,
    flatten_column,
)

Method = Literal["bytes", "exact", "min_edit_distance", "cooccurrence"]

SLICE_POSITIONS = 8_192
"""Positions whose distributions are mapped at a time: few enough for a core's own cache."""

KNOWN_SHARE = 0.9
"""Of what chance pays for a row, ln V nats a token: who pays less knows something of it. Random
weights pay 0.97 and more, knowing no more than how frequent tokens are about 0.7."""


@dataclass(frozen=True)
class Alignment:
    """All that aligning one source with the target needs, made once per pair."""

    source: TokenBytes
    target: TokenBytes
    maps: VocabMaps
    method: Method = "bytes"


@dataclass(frozen=True)
class Records:
    """A shard's captured records of one source, flat and as stored."""

    top_ids: Int[np.ndarray, "tokens top_k"]
    top_codes: UInt8[np.ndarray, "tokens top_k"]
    tail_logprobs: Float[np.ndarray, " tokens"]
    next_logprobs: Float[np.ndarray, " tokens"]
    log_totals: Float[np.ndarray, " tokens_plus_1"]
    """Sums of next_logprobs before each token: differences are chain log-probabilities."""
    has_draws: bool
    """Entries are draws: each is right on average only if nothing but draws decides on it."""


@dataclass(frozen=True)
class AlignedPositions:
    """What a source says of a shard's target positions, as stored."""

    top_ids: Int[np.ndarray, "tokens top_k"]
    top_codes: UInt8[np.ndarray, "tokens top_k"]
    tail_logprobs: Float[np.ndarray, " tokens"]


def align_shard(
    corpus: pa.Table, captured: pa.Table, alignment: Alignment
) -> tuple[pa.Table, dict[str, float]]:
    """Return the ALIGNED rows of a shard and its sums for reports.

    The sums: `positions` (target positions that a token follows), `with_signal`, `one_to_one` (of
    these, the next token is one source token), `unmatched: REASON`, and over the positions with a
    signal the mass outside the head, in the target's vocabulary (`tail_mass`) and before mapping
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
    records = _read_records(captured)
    _check_entries(records.top_ids, source_offsets, len(alignment.source.lengths))
    matches = find_matches(source, target, alignment)
    aligned = map_distributions(source, target, records, matches, alignment)
    has_signal = np.zeros(len(target_ids), dtype=bool)
    has_signal[matches.target_at] = True
    top_offsets = target_offsets * records.top_ids.shape[1]
    table = pa.Table.from_pydict(
        {
            "row_id": corpus["row_id"],
            "has_signal": build_list_column(has_signal, target_offsets, flags),
            "top_ids": build_list_column(aligned.top_ids.reshape(-1), top_offsets, ints),
            "top_logprobs": build_list_column(aligned.top_codes.reshape(-1), top_offsets, codes),
            "tail_logprobs": build_list_column(aligned.tail_logprobs, target_offsets, halfs),
            "nats_per_byte": build_list_column(
                spread_nats(source, target, records), target_offsets, halfs
            ),
            "nats": captured["nats"],
            "num_tokens": _count_text_tokens(source),
        },
        schema=ALIGNED,
    )
    with_signal = len(matches.target_at)
    nats, num_tokens = captured["nats"].to_numpy(), table["num_tokens"].to_numpy()
    chance = num_tokens * math.log(len(alignment.source.lengths))
    return table, {
        "scored_tokens": float(num_tokens[np.isfinite(nats)].sum()),
        "known_tokens": float(num_tokens[nats < KNOWN_SHARE * chance].sum()),
        "positions": float(target.has_next.sum()),
        "with_signal": float(with_signal),
        "one_to_one": float(len(keep_one_to_one(matches, source, target).target_at)),
        "tail_mass": _sum_mass(aligned.tail_logprobs[matches.target_at]),
        "captured_tail_mass": _sum_mass(records.tail_logprobs[matches.source_at]),
    } | {f"unmatched: {reason}": float(count) for reason, count in matches.unmatched.items()}


def find_matches(source: PlacedTokens, target: PlacedTokens, alignment: Alignment) -> Matches:
    """Return the target positions that learn from a source position, by the alignment's method."""
    if alignment.method == "min_edit_distance":
        from rayfuse.align.edit_distance import match_by_edit_distance  # compiled: slow to import

        vocabularies = (alignment.source, alignment.target)
        return match_by_edit_distance(source, target, vocabularies, alignment.maps)
    matches = match_positions(source, target)
    return keep_one_to_one(matches, source, target) if alignment.method == "exact" else matches


def map_distributions(
    source: PlacedTokens,
    target: PlacedTokens,
    records: Records,
    matches: Matches,
    alignment: Alignment,
) -> AlignedPositions:
    """Return the matched source positions' distributions over target tokens."""
    num_tokens, top_k = len(target.ids), records.top_ids.shape[1]
    aligned = AlignedPositions(
        top_ids=np.full((num_tokens, top_k), -1, dtype=np.int32),
        top_codes=np.zeros((num_tokens, top_k), dtype=np.uint8),
        tail_logprobs=np.full(num_tokens, LOWEST_LOGPROB, dtype=np.float16),
    )
    for start in range(0, len(matches.target_at), SLICE_POSITIONS):
        part = slice(start, start + SLICE_POSITIONS)
        _map_slice(source, target, records, matches.part(part), alignment, aligned)
    return aligned


def _map_slice(
    source: PlacedTokens,
    target: PlacedTokens,
    records: Records,
    matches: Matches,
    alignment: Alignment,
    aligned: AlignedPositions,
) -> None:
    """Map some matches' distributions: copy what is only renamed, work out the rest."""
    target_at, source_at, until = matches.target_at, matches.source_at, matches.source_until
    # The papers' rule knows no token but those it maps, so none is put in for the text's own.
    puts_truth = alignment.method != "min_edit_distance"
    true_ids = target.ids[target_at + 1]
    top_ids = records.top_ids[source_at].T.copy()
    is_first_piece = (top_ids == source.ids[source_at + 1]) & puts_truth
    blanks = target.next_has_blank[target_at].astype(np.int8) - source.next_has_blank[source_at]
    mapped_ids = _map_ids(top_ids, alignment.maps, blanks)
    entry, at = np.nonzero(is_first_piece)
    named_ids = mapped_ids.copy()
    named_ids[entry, at] = true_ids[at]
    is_renamed = find_renamed(named_ids, top_ids >= 0) & (until == source_at + 1)
    is_renamed &= is_first_piece.any(axis=0) | (not puts_truth)
    ours, theirs = source_at[is_renamed], target_at[is_renamed]
    aligned.top_ids[theirs] = named_ids[:, is_renamed].T
    aligned.top_codes[theirs] = records.top_codes[ours]
    aligned.tail_logprobs[theirs] = records.tail_logprobs[ours]

    rest = np.flatnonzero(~is_renamed)
    source_at, target_at, true_ids = source_at[rest], target_at[rest], true_ids[rest]
    tails = records.tail_logprobs[source_at]
    probs = decode_probs(records.top_codes[source_at].reshape(-1), top_ids[:, rest].T, tails)
    entries = TopEntries(top_ids[:, rest], probs.T, np.exp(tails.astype(np.float32)))
    first_logprobs = records.next_logprobs[source_at]
    chain = records.log_totals[until[rest]] - records.log_totals[source_at]
    mapped = put_true_token(
        map_entries(entries, mapped_ids[:, rest]),
        is_first_piece=is_first_piece[:, rest],
        first_probs=np.exp(first_logprobs) * (puts_truth and not records.has_draws),
        continuation_probs=np.exp(np.minimum(chain - first_logprobs, 0.0)).astype(np.float32),
        true_ids=true_ids,
    )
    ids, probs, tail = merge_entries(mapped, true_ids)
    aligned.top_ids[target_at] = ids
    aligned.top_codes[target_at] = encode_probs(probs).reshape(probs.shape)
    lowest = np.exp(np.float32(LOWEST_LOGPROB))
    aligned.tail_logprobs[target_at] = np.log(np.maximum(tail, lowest))


def _map_ids(
    top_ids: Int[np.ndarray, "entries positions"],
    maps: VocabMaps,
    blanks: Int[np.ndarray, " positions"],
) -> Int[np.ndarray, "entries positions"]:
    """Return the target ids of entries; `blanks` tells which map each position takes."""
    mapped_ids = maps[PLAIN][top_ids]
    differing = np.flatnonzero(blanks)
    mapped_ids[:, differing] = maps[blanks[differing], top_ids[:, differing]]
    return mapped_ids


def _count_text_tokens(source: PlacedTokens) -> Int[np.ndarray, " rows"]:
    """Return how many of each row's source tokens a model predicts as text."""
    before = np.concatenate([[0], np.cumsum(source.has_next & ~source.next_is_eos)])
    return np.diff(before[source.offsets]).astype(np.int32)


def _read_records(captured: pa.Table) -> Records:
    tokens = len(flatten_column(captured, "token_ids")[0])
    top_ids, top_codes, draw_ids, draw_counts = (
        _flatten_positions(captured, name, tokens)
        for name in ("top_ids", "top_logprobs", "draw_ids", "draw_counts")
    )
    tails = flatten_column(captured, "tail_logprobs")[0]
    has_draws = draw_ids.shape[1] > 0
    if has_draws:
        top_ids, top_codes, tails = _weigh_draws(top_ids, top_codes, tails, draw_ids, draw_counts)
    next_logprobs = flatten_column(captured, "next_logprobs")[0].astype(np.float32)
    return Records(
        top_ids=top_ids,
        top_codes=top_codes,
        tail_logprobs=tails,
        next_logprobs=next_logprobs,
        log_totals=np.concatenate([[0.0], np.cumsum(next_logprobs, dtype=np.float64)]),
        has_draws=has_draws,
    )


def _flatten_positions(captured: pa.Table, name: str, tokens: int) -> np.ndarray:
    """Return a column's values with the entries of each of the tokens side by side."""
    flat = flatten_column(captured, name)[0]
    return flat.reshape(tokens, len(flat) // tokens if tokens else 0)


def _weigh_draws(
    top_ids: Int[np.ndarray, "tokens top_k"],
    top_codes: UInt8[np.ndarray, "tokens top_k"],
    tail_logprobs: Float[np.ndarray, " tokens"],
    draw_ids: Int[np.ndarray, "tokens draws"],
    draw_counts: UInt8[np.ndarray, "tokens draws"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, codes and tails in which the draws are entries and share the tail's mass."""
    num_entries = top_ids.shape[1] + draw_ids.shape[1]
    ids = np.empty((len(top_ids), num_entries), dtype=np.int32)
    levels = np.empty((len(top_ids), num_entries), dtype=np.uint8)
    tails = np.empty_like(tail_logprobs)
    for start in range(0, len(top_ids), SLICE_POSITIONS):
        part = slice(start, start + SLICE_POSITIONS)
        head = decode_probs(top_codes[part].reshape(-1), top_ids[part], tail_logprobs[part])
        num_drawn = draw_counts[part].sum(axis=1, keepdims=True)
        share = np.exp(tail_logprobs[part].astype(np.float32))[:, None] / np.maximum(num_drawn, 1)
        probs = np.concatenate([head, draw_counts[part] * share], axis=1, dtype=np.float32)
        order = np.argsort(-probs, axis=1, kind="stable")
        both = np.concatenate([top_ids[part], draw_ids[part]], axis=1)
        ids[part] = np.take_along_axis(both, order, axis=1)
        levels[part] = encode_probs(np.take_along_axis(probs, order, axis=1)).reshape(probs.shape)
        tails[part] = np.where(num_drawn[:, 0] > 0, LOWEST_LOGPROB, tail_logprobs[part])
    return ids, levels, tails


def _sum_mass(logprobs: Float[np.ndarray, " positions"]) -> float:
    return float(np.exp(logprobs.astype(np.float64)).sum())


def _check_entries(
    top_ids: Int[np.ndarray, "tokens top_k"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    vocab_size: int,
) -> None:
    if top_ids.size and (top_ids.max() >= vocab_size or top_ids.min() < -1):
        at = int(np.flatnonzero(((top_ids >= vocab_size) | (top_ids < -1)).any(axis=1))[0])
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        raise ValueError(
            f"row {row}, position {at - offsets[row]}: top_ids {top_ids[at].tolist()} are outside "
            f"the vocabulary of {vocab_size}"
        )


def spread_nats(
    source: PlacedTokens, target: PlacedTokens, records: Records
) -> Float[np.ndarray, " tokens"]:
    """Return the source's cost of each target position's next token, in nats per byte, float16.

    A source token's cost is spread evenly over its bytes, so that any stretch of the text has one.
    Bytes that the source is never asked for, before its first prediction and where it leaves out
    the end of the text, cost nothing. A row's costs depend on nothing but that row.
    """
    costs = np.zeros(len(target.ids), dtype=np.float16)
    if not len(source.ids):
        return costs
    final = len(source.ids) - 1  # an empty row is given another's place, and no bytes there
    firsts = np.minimum(source.offsets[:-1], final)
    lasts = np.minimum(source.offsets[:-1] + _count_text_tokens(source), final)
    # Sums of float16 numbers are exact in float64: what other rows paid drops out to the bit.
    paid = -records.log_totals[:-1]
    paid -= np.repeat(paid[firsts], np.diff(source.offsets))
    is_text = ~np.append(False, source.next_is_eos[:-1])
    ends, paid = source.ends[is_text], paid[is_text]
    # Where several tokens end at one byte, the last has paid for all before it.
    is_last = np.append(ends[1:] != ends[:-1], True)
    low, high = (np.repeat(source.ends[at], np.diff(target.offsets)) for at in (firsts, lasts))
    told = np.minimum(np.maximum(target.ends, low), high)
    spent = np.diff(np.interp(told, ends[is_last], paid[is_last]), append=0.0)
    num_bytes = np.diff(target.ends, append=0)
    is_text = target.has_next & (num_bytes > 0) & ~target.next_is_eos
    costs[is_text] = spent[is_text] / num_bytes[is_text]
    return costs
