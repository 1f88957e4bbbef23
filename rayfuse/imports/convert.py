"""A foreign row and the corpus row of the same text -> the record that capture would store."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from rayfuse.capture.top_k import MIN_RESOLVED_TAIL, TopLogprobs
from rayfuse.imports.record import ForeignRow, sort_entries
from rayfuse.imports.store import Vocabulary, strip_specials

NO_DISTRIBUTION = "none of its positions has a distribution"


@dataclass(frozen=True)
class ConvertedRow:
    """A record, and how much of it was not stored."""

    top: TopLogprobs
    unrecorded: int
    """Positions without a distribution, which have no signal: their NLL is the row's mean."""
    estimated: int
    """Positions whose next token has no log-probability in the store."""


def convert_row(
    stored: ForeignRow,
    own_tokens: Int[np.ndarray, " own_len"],
    tokens: Int[np.ndarray, " seq_len"],
    vocabulary: Vocabulary,
    *,
    top_k: int,
) -> ConvertedRow:
    """Move the distributions of a text to the positions of a row of rayfuse.

    Both hold the same text; they may differ in the special tokens before and after it. A
    distribution counts where the tokens before it are the same.

    Args:
        stored: The distributions of the store's row.
        own_tokens: The tokens of the store's row.
        tokens: The row's: start token, text and EOS.
        vocabulary: The source's.
        top_k: Columns of the record: entries beyond them join the tail.

    Raises:
        ValueError: No position has a distribution, or one lists a token twice.
    """
    if not len(stored.top_ids):
        raise ValueError(NO_DISTRIBUTION)
    first, stop, _ = strip_specials(own_tokens, vocabulary)
    start = int(vocabulary.start_id is not None)
    at = np.arange(len(tokens)) + first - start
    has_start = start > 0 and first > 0 and own_tokens[first - 1] == vocabulary.start_id
    begin = first - 1 if has_start else first
    is_stored = (at >= begin) & (at < min(stop, len(stored.top_ids)))
    at = np.where(is_stored, at, 0)
    part = _select(stored, at, vocabulary.known)
    is_stored &= part.top_ids[:, 0] >= 0
    following = np.append(tokens[1:], -2)
    follows_alike = np.append(own_tokens, -3)[at + 1] == following
    next_logprobs, is_known = _find_next(part, following, follows_alike, len(vocabulary.known))
    has_next = np.arange(len(tokens)) < len(tokens) - 1
    is_scored = is_stored & has_next
    if has_next.any() and not is_scored.any():
        raise ValueError(NO_DISTRIBUTION)
    mean = float(next_logprobs[is_scored].mean()) if is_scored.any() else 0.0
    kept = _keep_entries(part, top_k)
    return ConvertedRow(
        TopLogprobs(
            top_ids=np.where(is_stored[:, None], kept.top_ids, np.int32(-1)),
            top_logprobs=np.where(is_stored[:, None], kept.top_logprobs, -np.inf),
            tail_logprobs=np.where(is_stored, kept.tail_logprobs, 0.0),
            next_logprobs=np.where(has_next, np.where(is_stored, next_logprobs, mean), 0.0),
            drawn_ids=np.zeros((len(tokens), 0), dtype=np.int32),
        ),
        unrecorded=int((has_next & ~is_stored).sum()),
        estimated=int((is_scored & ~is_known).sum()),
    )


def _select(
    stored: ForeignRow, at: Int[np.ndarray, " seq_len"], known_ids: Bool[np.ndarray, " vocab"]
) -> ForeignRow:
    """Select positions; entries that the tokenizer lacks, of a padded head, join the tail."""
    ids = stored.top_ids[at]
    in_order = np.sort(ids, axis=1)
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
        raise ValueError("a position lists a token twice")
    is_known = (ids >= 0) & (ids < len(known_ids))
    is_known &= known_ids[np.where(is_known, ids, 0)]
    logprobs = stored.top_logprobs[at]
    lost = np.exp(np.where(is_known, -np.inf, logprobs)).sum(axis=1)
    own = np.where(is_known, ids, np.int32(-1)), np.where(is_known, logprobs, -np.inf)
    tails = np.log(np.exp(stored.tail_logprobs[at]) + lost)
    return ForeignRow(*sort_entries(*own), tails, stored.next_logprobs[at])


def _find_next(
    part: ForeignRow,
    following: Int[np.ndarray, " seq_len"],
    follows_alike: Bool[np.ndarray, " seq_len"],
    vocab_size: int,
) -> tuple[Float[np.ndarray, " seq_len"], Bool[np.ndarray, " seq_len"]]:
    """Find the next token's log-probability, and where the store has it.

    Elsewhere it is an equal share of the tail. On the tiny models that ship with rayfuse that is
    nearer to the mean NLL of such tokens than the log-probability of the least likely entry.

    Args:
        part: The distributions.
        following: The token that comes next in the row; one that does not exist after the last.
        follows_alike: Where the same token comes next in the store.
        vocab_size: Of the tokenizer.
    """
    is_next = (part.top_ids == following[:, None]) & (part.top_ids >= 0)
    is_entry = is_next.any(axis=1)
    of_entry = np.where(is_next, part.top_logprobs, 0.0).sum(axis=1)
    others = np.maximum(vocab_size - (part.top_ids >= 0).sum(axis=1), 1)
    has_own = follows_alike & np.isfinite(part.next_logprobs)
    found = np.where(is_entry, of_entry, part.tail_logprobs - np.log(others))
    return np.where(has_own, part.next_logprobs, found), has_own | is_entry


def _keep_entries(part: ForeignRow, top_k: int) -> ForeignRow:
    """Keep exactly `top_k` columns: of the likeliest entries, then of -1.

    The mass of the other entries joins the tail.
    """
    lost = np.exp(part.top_logprobs[:, top_k:]).sum(axis=1)
    tails = np.log(np.maximum(np.exp(part.tail_logprobs) + lost, MIN_RESOLVED_TAIL))
    behind = ((0, 0), (0, max(top_k - part.top_ids.shape[1], 0)))
    return replace(
        part,
        top_ids=np.pad(part.top_ids[:, :top_k], behind, constant_values=-1),
        top_logprobs=np.pad(part.top_logprobs[:, :top_k], behind, constant_values=-np.inf),
        tail_logprobs=tails,
    )
