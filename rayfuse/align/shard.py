"""CORPUS and CAPTURED rows of a shard -> its ALIGNED rows."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.align.boundaries import PlacedTokens, SpelledVocabulary, place_tokens, spell_vocabulary
from rayfuse.align.distributions import TopEntries, map_entries, merge_entries, put_true_token
from rayfuse.align.vocab_map import map_vocabulary
from rayfuse.schema import (
    ALIGNED,
    LOWEST_LOGPROB,
    build_list_column,
    codes,
    decode_logprobs,
    encode_logprobs,
    flags,
    flatten_column,
    halfs,
    ints,
)
from rayfuse.tokens import TextTokenizer

SLICE_POSITIONS = 32_768
"""Positions whose distributions are mapped at a time: about 30 MB at top-16."""


@dataclass(frozen=True)
class Alignment:
    """All that aligning one source with the target needs, made once per pair."""

    source: SpelledVocabulary
    target: SpelledVocabulary
    vocab_map: Int[np.ndarray, " source_vocab"]


def build_alignment(source: TextTokenizer, target: TextTokenizer) -> Alignment:
    """Return what aligning a source's tokens with the target's needs."""
    return Alignment(
        spell_vocabulary(source), spell_vocabulary(target), map_vocabulary(source, target)
    )


@dataclass(frozen=True)
class Matches:
    """Target positions and the source positions that start at the same byte."""

    target_at: Int[np.ndarray, " matches"]
    source_at: Int[np.ndarray, " matches"]
    source_until: Int[np.ndarray, " matches"]
    """The first source position that starts where the target's next token ends, or beyond."""


@dataclass(frozen=True)
class Records:
    """A shard's captured records of one source, flat."""

    top_ids: Int[np.ndarray, "tokens top_k"]
    top_logprobs: Float[np.ndarray, "tokens top_k"]
    tail_probs: Float[np.ndarray, " tokens"]
    next_logprobs: Float[np.ndarray, " tokens"]

    log_totals: Float[np.ndarray, " tokens_plus_1"]
    """Sums of next_logprobs before each token: differences are chain log-probabilities."""


def align_shard(
    corpus: pa.Table, captured: pa.Table, alignment: Alignment
) -> tuple[pa.Table, dict[str, float]]:
    """Return the ALIGNED rows of a shard and its sums for reports.

    The sums: `positions` (target positions that a token follows), `with_signal`, and `tail_mass`
    over the positions with a signal, in the target's vocabulary (`tail_mass`) and before mapping
    (`captured_tail_mass`).

    Raises:
        ValueError: The two tables do not hold the same rows.
    """
    if corpus["row_id"].to_pylist() != captured["row_id"].to_pylist():
        raise ValueError("corpus and captured shard hold different rows; capture the shard again")
    texts = [text.encode() for text in corpus["text"].to_pylist()]
    target_ids, target_offsets = flatten_column(corpus, "target_ids")
    source_ids, source_offsets = flatten_column(captured, "token_ids")
    target = place_tokens(target_ids, target_offsets, texts, alignment.target)
    source = place_tokens(source_ids, source_offsets, texts, alignment.source)
    records = _read_records(captured)
    matches = match_positions(source, target)
    top_k = records.top_ids.shape[1]
    ids = np.full((len(target_ids), top_k), -1, dtype=np.int32)
    logprobs = np.full((len(target_ids), top_k), -np.inf)
    tails = np.zeros(len(target_ids))
    captured_tail = float(records.tail_probs[matches.source_at].sum())
    for start in range(0, len(matches.target_at), SLICE_POSITIONS):
        part = slice(start, start + SLICE_POSITIONS)
        entries = _map_matches(source, target, records, matches, part, alignment.vocab_map)
        at = matches.target_at[part]
        ids[at] = entries.ids
        with np.errstate(divide="ignore"):
            logprobs[at] = np.log(entries.probs)
        tails[at] = entries.tail
    has_signal = np.zeros(len(target_ids), dtype=bool)
    has_signal[matches.target_at] = True
    table = pa.Table.from_pydict(
        {
            "row_id": corpus["row_id"],
            "has_signal": build_list_column(has_signal, target_offsets, flags),
            "top_ids": build_list_column(ids.reshape(-1), target_offsets * top_k, ints),
            "top_logprobs": build_list_column(
                encode_logprobs(logprobs), target_offsets * top_k, codes
            ),
            "tail_logprobs": build_list_column(_to_logs(tails), target_offsets, halfs),
            "nats_per_byte": build_list_column(
                _spread_nats(source, target, records, texts), target_offsets, halfs
            ),
            "nats": captured["nats"],
        },
        schema=ALIGNED,
    )
    return table, {
        "positions": float(target.has_next.sum()),
        "with_signal": float(len(matches.target_at)),
        "tail_mass": float(tails.sum()),
        "captured_tail_mass": captured_tail,
    }


def match_positions(source: PlacedTokens, target: PlacedTokens) -> Matches:
    """Return the target positions that start at the same byte as a source position.

    Where a tokenizer puts a blank before the text and the other does not, what they say of the
    first token is not about the same bytes: no match there.
    """
    usable_source = np.flatnonzero(source.can_match)
    usable_target = np.flatnonzero(target.can_match)
    if not len(usable_source) or not len(usable_target):
        none = np.zeros(0, dtype=np.int64)
        return Matches(none, none, none)
    starts = source.ends[usable_source]
    index = np.searchsorted(starts, target.ends[usable_target])
    index = np.minimum(index, len(starts) - 1)
    at = usable_source[index]
    is_match = (
        (starts[index] == target.ends[usable_target])
        & (source.next_has_blank[at] == target.next_has_blank[usable_target])
        & (source.next_is_eos[at] == target.next_is_eos[usable_target])
    )
    target_at, source_at = usable_target[is_match], at[is_match]
    stop = target.ends[np.minimum(target_at + 1, len(target.ends) - 1)]
    until = np.searchsorted(source.ends, stop)
    until = np.where(target.next_is_eos[target_at], source_at + 1, until)
    until = np.minimum(until, len(source.ends) - 1)
    is_whole = (until > source_at) & source.is_placed[until]
    return Matches(target_at[is_whole], source_at[is_whole], until[is_whole])


def _map_matches(
    source: PlacedTokens,
    target: PlacedTokens,
    records: Records,
    matches: Matches,
    part: slice,
    vocab_map: Int[np.ndarray, " source_vocab"],
) -> TopEntries:
    """Return a slice of matches' distributions over target tokens."""
    target_at, source_at = matches.target_at[part], matches.source_at[part]
    source_until = matches.source_until[part]
    top_ids = records.top_ids[source_at]
    first_ids, true_ids = source.ids[source_at + 1], target.ids[target_at + 1]
    first_logprobs = records.next_logprobs[source_at]
    chain = records.log_totals[source_until] - records.log_totals[source_at]
    entries = TopEntries(
        top_ids, np.exp(records.top_logprobs[source_at]), records.tail_probs[source_at]
    )
    mapped = put_true_token(
        map_entries(entries, vocab_map),
        is_first_piece=(top_ids == first_ids[:, None]) & (vocab_map[top_ids] >= 0),
        first_probs=np.exp(first_logprobs),
        continuation_probs=np.exp(np.minimum(chain - first_logprobs, 0.0)),
        true_ids=true_ids,
    )
    return merge_entries(mapped, top_ids.shape[1], true_ids)


def _read_records(captured: pa.Table) -> Records:
    tokens = len(flatten_column(captured, "token_ids")[0])
    flat_ids = flatten_column(captured, "top_ids")[0]
    top_k = len(flat_ids) // tokens if tokens else 1
    top_ids = flat_ids.reshape(tokens, top_k)
    tails = flatten_column(captured, "tail_logprobs")[0].astype(np.float64)
    differences = flatten_column(captured, "top_logprobs")[0]
    next_logprobs = flatten_column(captured, "next_logprobs")[0].astype(np.float64)
    return Records(
        top_ids=top_ids,
        top_logprobs=decode_logprobs(differences, top_ids, tails),
        tail_probs=np.exp(tails),
        next_logprobs=next_logprobs,
        log_totals=np.concatenate([[0.0], np.cumsum(next_logprobs)]),
    )


def _to_logs(probs: Float[np.ndarray, " positions"]) -> np.ndarray:
    """Return float16 logs, of 0 the lowest that is stored."""
    lowest = np.exp(LOWEST_LOGPROB)
    return np.log(np.maximum(probs, lowest)).astype(np.float16)


def _spread_nats(
    source: PlacedTokens, target: PlacedTokens, records: Records, texts: list[bytes]
) -> np.ndarray:
    """Return the source's cost of each target position's next token, in nats per byte.

    A source token's cost is spread evenly over its bytes, so that any stretch of the text has one.
    """
    costs = np.zeros(len(target.ids))
    if len(source.ids):
        is_text = ~np.append(False, source.next_is_eos[:-1])
        ends, paid = source.ends[is_text], -records.log_totals[:-1][is_text]
        # Where several tokens end at one byte, the last has paid for all before it.
        is_last = np.append(ends[1:] != ends[:-1], True)
        upto = np.interp(target.ends, ends[is_last], paid[is_last])
        num_bytes = np.diff(target.ends, append=target.ends[-1])
        is_text = target.can_match & (num_bytes > 0) & ~target.next_is_eos
        spent = np.diff(upto, append=upto[-1])
        np.divide(spent, num_bytes, out=costs, where=is_text)
    return costs.astype(np.float16)
