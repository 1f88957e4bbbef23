"""One example, small enough to check on paper.

The text is "the cats", 8 bytes. Below each token stands the byte where it ends:

    source   <s>   the   _c   at   s   </s>        target   <s>   th   e   _cat   s   </s>
              0     3     5    7    8   8                     0    2   3     7    8   8

What a model says at a token starts where the token ends. Bytes 0, 3, 7 and 8 are on both sides, so
the target's <s>, e, _cat and s learn from the source's <s>, the, at and s. At byte 2 the source
says nothing. The target's _cat spans the source's _c and at: its probability is 0.5 * 0.8.
"""

import numpy as np
import pyarrow as pa
import pytest

from rayfuse.align.method import Alignment, load_method
from rayfuse.align.shard import align_shard
from rayfuse.align.token_spans import TokenBytes
from rayfuse.capture.rows import build_captured
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.schema import CORPUS
from rayfuse.storage.codec import decode_probs, flatten_column

SOURCE = ["<s>", "the", " c", "at", "s", " cats", "</s>"]
TARGET = ["<s>", "th", "e", " cat", "s", "the", " c", "</s>"]
#          source ids: the=1, _c=2, at=3, s=4, _cats=5, </s>=6
VOCAB_MAP = np.array([-1, 5, 6, -1, 4, 3, 7, -1], dtype=np.int32)  # "_cats" begins with "_cat"

SOURCE_IDS = np.array([0, 1, 2, 3, 4, 6], dtype=np.int32)
TARGET_IDS = np.array([0, 1, 2, 3, 4, 7], dtype=np.int32)

# Top 2 of each source position, the rest is tail; the last position has no next token.
TOP_IDS = [[1, 2], [2, 5], [3, 4], [4, 1], [6, 2], [1, 2]]
TOP_PROBS = [[0.6, 0.3], [0.5, 0.3], [0.8, 0.1], [0.9, 0.05], [0.7, 0.2], [0.5, 0.5]]
NEXT_PROBS = [0.6, 0.5, 0.8, 0.9, 0.7, 1.0]


def spell(tokens: list[str]) -> TokenBytes:
    spelled = [b"" if token.startswith("<") else token.encode() for token in tokens]
    lengths = np.array([len(token) for token in spelled])
    return TokenBytes(
        lengths=lengths,
        starts=np.cumsum(lengths) - lengths,
        blob=np.frombuffer(b"".join(spelled), dtype=np.uint8),
        adds_prefix_space=False,
        eos_id=len(tokens) - 1,
        start_id=0,
        tokenizer=None,
    )


def align_example() -> tuple[pa.Table, dict[str, float]]:
    corpus = pa.Table.from_pydict(
        {
            "row_id": ["d#0"],
            "doc_id": ["d"],
            "domain": [""],
            "text": ["the cats"],
            "num_bytes": [8],
            "ends_document": [True],
            "target_ids": [TARGET_IDS],
        },
        schema=CORPUS,
    )
    record = TopLogprobs(
        top_ids=np.array(TOP_IDS, dtype=np.int32),
        top_logprobs=np.log(TOP_PROBS),
        tail_logprobs=np.log(np.maximum(1 - np.sum(TOP_PROBS, axis=1), 1e-9)),
        next_logprobs=np.log(NEXT_PROBS),
        drawn_ids=np.zeros((len(TOP_IDS), 0), dtype=np.int32),
    )
    captured, _ = build_captured(corpus, [SOURCE_IDS], [record], eos_id=6)
    return align_shard(
        corpus,
        captured,
        Alignment(spell(SOURCE), spell(TARGET), np.stack([VOCAB_MAP] * 3), load_method("bytes")),
    )


def distributions(table: pa.Table) -> list[dict[str, float]]:
    """Return each target position's distribution, by token and `tail`."""
    top_ids = flatten_column(table, "top_ids")[0].reshape(-1, 2)
    tails = flatten_column(table, "tail_logprobs")[0].astype(float)
    probs = decode_probs(flatten_column(table, "top_logprobs")[0], top_ids, tails)
    return [
        {TARGET[i]: float(p) for i, p in zip(ids, row, strict=True) if i >= 0}
        | {"tail": float(np.exp(tail))}
        for ids, row, tail in zip(top_ids, probs, tails, strict=True)
    ]


def test_positions_learn_where_both_sides_share_a_byte():
    table, stats = align_example()
    assert table["has_signal"].to_pylist() == [[True, False, True, True, True, False]]
    assert (stats["positions"], stats["with_signal"]) == (5, 4)


def test_position_t_speaks_of_token_t_plus_1():
    table, _ = align_example()
    at = distributions(table)
    # The source's sure next tokens: after _cat comes "s" (0.9), after "s" comes </s> (0.7). A
    # record that spoke of its own token would have them one position later.
    assert at[3]["s"] == pytest.approx(0.9, rel=0.02)
    assert at[4]["</s>"] == pytest.approx(0.7, rel=0.02)


def test_a_token_that_spans_two_has_the_product_and_the_rest_of_its_first_piece_is_tail():
    table, _ = align_example()
    at = distributions(table)[2]
    # _cat: 0.5 * 0.8 of the chain, and 0.3 of "_cats", which begins with it. _c is gone; of its
    # 0.5 what is beyond 0.4 joins the tail of 0.2.
    assert set(at) == {" cat", "tail"}
    assert at[" cat"] == pytest.approx(0.4 + 0.3, rel=0.02)
    assert at["tail"] == pytest.approx(0.2 + 0.1, rel=0.02)


def test_a_source_token_longer_than_the_targets_counts_for_the_target_token_that_begins_it():
    table, _ = align_example()
    # At byte 0 the target's next token is "th": the source's "the" (0.6) begins with it and is what
    # the text really has, so its mass counts for "th"; "_c" (0.3) keeps its own.
    at = distributions(table)[0]
    assert at["th"] == pytest.approx(0.6, rel=0.02)
    assert at[" c"] == pytest.approx(0.3, rel=0.02)


def test_nats_count_the_text_and_not_the_end_of_it():
    table, _ = align_example()
    expected = -np.log(0.6 * 0.5 * 0.8 * 0.9)
    assert table["nats"].to_pylist() == [pytest.approx(expected, rel=1e-3)]
    per_byte = np.array(table["nats_per_byte"].to_pylist()[0], dtype=float)
    # "the" costs -ln 0.6 over 3 bytes: 2 fall on "th", 1 on "e".
    assert per_byte[0] == pytest.approx(-np.log(0.6) / 3, rel=1e-3)
    assert per_byte[1] == pytest.approx(-np.log(0.6) / 3, rel=1e-3)
    assert (per_byte[:4] * [2, 1, 4, 1]).sum() == pytest.approx(expected, rel=1e-3)
    assert per_byte[4:].tolist() == [0.0, 0.0]
