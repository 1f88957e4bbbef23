"""A source's NLL, spread over the bytes of the text and collected per target token."""

import numpy as np
from jaxtyping import Float, Int

from rayfuse.align.records import SourceRecords
from rayfuse.align.token_spans import PlacedTokens


def count_text_tokens(source: PlacedTokens) -> Int[np.ndarray, " rows"]:
    """Count each row's source tokens that a model predicts as text: EOS is excluded."""
    before = np.concatenate([[0], np.cumsum(source.has_next & ~source.next_is_eos)])
    return np.diff(before[source.offsets]).astype(np.int32)


def spread_nll(
    source: PlacedTokens, target: PlacedTokens, records: SourceRecords
) -> Float[np.ndarray, " tokens"]:
    """Compute the source's NLL of each target position's next token, in nats per byte, float16.

    A source token's NLL is spread evenly over its bytes, so that every stretch of the text has one.
    Bytes that the source never predicts count 0: those before its first prediction, and an end of
    the text that its tokenizer drops. The result of a row depends on that row alone.
    """
    per_byte = np.zeros(len(target.ids), dtype=np.float16)
    if not len(source.ids):
        return per_byte
    final = len(source.ids) - 1  # an empty row is given another row's position, and no bytes there
    firsts = np.minimum(source.offsets[:-1], final)
    lasts = np.minimum(source.offsets[:-1] + count_text_tokens(source), final)
    # Sums of float16 numbers are exact in float64, so subtracting the sum of all rows before makes
    # a row's numbers bit-identical whatever rows stand before it.
    nll_before = -records.log_totals[:-1]
    num_tokens = np.diff(source.offsets)
    nll_before -= np.repeat(nll_before[firsts], num_tokens)
    # A token without bytes at the start of a row, such as a prefix space alone, counts for the
    # bytes after it: up to there the sum is 0.
    nll_before[source.ends == np.repeat(source.ends[firsts], num_tokens)] = 0.0
    is_text = ~np.append(False, source.next_is_eos[:-1])
    ends, nll_before = source.ends[is_text], nll_before[is_text]
    # Where several tokens end at one byte, the sum at the last of them includes the others.
    is_last = np.append(ends[1:] != ends[:-1], True)
    low, high = (np.repeat(source.ends[at], np.diff(target.offsets)) for at in (firsts, lasts))
    predicted_ends = np.minimum(np.maximum(target.ends, low), high)
    nll = np.diff(np.interp(predicted_ends, ends[is_last], nll_before[is_last]), append=0.0)
    num_bytes = np.diff(target.ends, append=0)
    is_text = target.has_next & (num_bytes > 0) & ~target.next_is_eos
    per_byte[is_text] = nll[is_text] / num_bytes[is_text]
    return per_byte
