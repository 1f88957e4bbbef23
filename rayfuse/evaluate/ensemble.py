"""The ensemble of several sources on text: the mean of what they give to the same bytes.

Sources cut a text into different tokens, so the mean is taken where all of them begin anew: at the
bytes that all their tokenisations share. From one such byte to the next, each source's probability
is the product over its own tokens (the chain probability of METHOD 3 and 4, exact, with nothing
lost to a top k), and the ensemble's is the mean of these. Inside a source's token, where an aligned
record has no signal, nothing is asked of it: its token is paid for whole. With one tokenizer for
all this is the mean of the next-token distributions. A single source pays what it pays alone.

With several tokenizers the ensemble is told for nothing where the next joint boundary comes, which
may depend on text behind it: an advantage over every single model, if a small one.
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
    """What one model pays for a row of text, token by token; neither start token nor EOS."""

    ends: Int[np.ndarray, " tokens"]
    """The byte after the last one that each token spells, from the row's first; never decreases.
    The last is the row's number of bytes."""
    nats: Float[np.ndarray, " tokens"]
    """-log of each token's probability, given those before."""


def find_joint_ends(sources: Sequence[TokenNLL]) -> Int[np.ndarray, " chunks"]:
    """Return the bytes at which a token of every source ends, in order; the row's end is the last.

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
    """Return what the ensemble pays, chunk by chunk: from one joint end to the next.

    Args:
        sources: All of the same row, at least one; each has the same say.

    Raises:
        ValueError: As for `find_joint_ends`.
    """
    joint_ends = find_joint_ends(sources)
    costs = np.stack([_sum_chunks(source, joint_ends) for source in sources])
    mean_logprobs = np.logaddexp.reduce(-costs, axis=0) - math.log(len(sources))
    return TokenNLL(joint_ends, -mean_logprobs)


def _sum_chunks(
    source: TokenNLL, joint_ends: Int[np.ndarray, " chunks"]
) -> Float[np.ndarray, " chunks"]:
    """Return what a source pays from one joint end to the next, all tokens that end there within.

    A token that spells nothing the text has, as a blank put before it, belongs to the chunk that
    ends where it does.
    """
    paid = np.concatenate([[0.0], np.cumsum(source.nats, dtype=np.float64)])
    return np.diff(paid[np.searchsorted(source.ends, joint_ends, side="right")], prepend=0.0)


def build_costs(row_ids: list[str], rows: Sequence[TokenNLL]) -> pa.Table:
    """Return the TOKEN_NLL rows."""
    offsets = np.concatenate([[0], np.cumsum([len(row.ends) for row in rows])]).astype(np.int64)
    ends = np.concatenate([np.zeros(0, np.int32), *(row.ends for row in rows)]).astype(np.int32)
    nats = np.concatenate([np.zeros(0), *(row.nats for row in rows)]).astype(np.float32)
    columns = {
        "row_id": pa.array(row_ids, type=pa.string()),
        "ends": build_list_column(ends, offsets, ints),
        "nats": build_list_column(nats, offsets, floats),
    }
    return pa.Table.from_pydict(columns, schema=TOKEN_NLL)


def read_costs(table: pa.Table) -> list[TokenNLL]:
    """Return what TOKEN_NLL rows hold."""
    ends, offsets = flatten_column(table, "ends")
    nats = flatten_column(table, "nats")[0]
    cuts = offsets[1:-1]
    return [TokenNLL(*row) for row in zip(np.split(ends, cuts), np.split(nats, cuts), strict=True)]
