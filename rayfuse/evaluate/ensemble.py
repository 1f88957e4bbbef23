"""The ensemble of several sources on text: the mean of their probabilities of the same bytes.

Sources split a text into different tokens, so the mean is taken over chunks: the spans between
bytes at which a token of every source ends. A source's probability of a chunk is the product over
its own tokens (the chain rule, exact, without truncation to a top k), and the ensemble's is the
mean of these. With one tokenizer for all sources this is the mean of the next-token distributions;
for a single source it is that source.

With several tokenizers the ensemble has a small advantage over every single model: where the next
common boundary comes may depend on the text after it, and the ensemble knows it for free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.schema import TOKEN_NLL, floats, ints
from rayfuse.storage.codec import build_list_column, flatten_column


@dataclass(frozen=True)
class TokenNLL:
    """The NLL of a row of text under one model, token by token, without start token and EOS."""

    ends: Int[np.ndarray, " tokens"]
    """End of each token, in bytes from the start of the row. Never decreases; the last one is the
    row's number of bytes."""
    nats: Float[np.ndarray, " tokens"]
    """-log of each token's probability given the tokens before it."""


def find_joint_ends(sources: Sequence[TokenNLL]) -> Int[np.ndarray, " chunks"]:
    """Find the bytes at which a token of every source ends, in order; the row's end is the last.

    Raises:
        ValueError: The sources' tokens do not end at the same byte.
    """
    stops = [int(source.ends[-1]) if len(source.ends) else 0 for source in sources]
    if len(set(stops)) > 1:
        raise ValueError(
            f"the sources' tokens spell {stops} bytes of one row; score the same text with each"
        )
    return reduce(np.intersect1d, [source.ends for source in sources])


def average_sources(sources: Sequence[TokenNLL]) -> TokenNLL:
    """Compute the ensemble's NLL, chunk by chunk.

    Args:
        sources: The same row under each source, at least one; all have equal weight.

    Raises:
        ValueError: As for `find_joint_ends`.
    """
    joint_ends = find_joint_ends(sources)
    chunk_nats = np.stack([sum_chunks(source, joint_ends) for source in sources])
    mean_logprobs = np.logaddexp.reduce(-chunk_nats, axis=0) - math.log(len(sources))
    return TokenNLL(joint_ends, -mean_logprobs)


def sum_chunks(
    source: TokenNLL, joint_ends: Int[np.ndarray, " chunks"]
) -> Float[np.ndarray, " chunks"]:
    """Add up a source's NLL over each chunk.

    A token that spells no byte of the text, such as a prefix space, ends where the token before it
    does. `side="right"` puts both into the same chunk.
    """
    total_nats = np.concatenate([[0.0], np.cumsum(source.nats, dtype=np.float64)])
    num_tokens = np.searchsorted(source.ends, joint_ends, side="right")
    return np.diff(total_nats[num_tokens], prepend=0.0)


def build_nll_table(row_ids: list[str], rows: Sequence[TokenNLL]) -> pa.Table:
    """Build the TOKEN_NLL rows."""
    offsets = np.concatenate([[0], np.cumsum([len(row.ends) for row in rows])]).astype(np.int64)
    ends = np.concatenate([np.zeros(0, np.int32), *(row.ends for row in rows)]).astype(np.int32)
    nats = np.concatenate([np.zeros(0), *(row.nats for row in rows)]).astype(np.float32)
    columns = {
        "row_id": pa.array(row_ids, type=pa.string()),
        "ends": build_list_column(ends, offsets, ints),
        "nats": build_list_column(nats, offsets, floats),
    }
    return pa.Table.from_pydict(columns, schema=TOKEN_NLL)


def read_nll_table(table: pa.Table) -> list[TokenNLL]:
    """Read TOKEN_NLL rows."""
    ends, offsets = flatten_column(table, "ends")
    nats = flatten_column(table, "nats")[0]
    cuts = offsets[1:-1]
    return [TokenNLL(*row) for row in zip(np.split(ends, cuts), np.split(nats, cuts), strict=True)]
