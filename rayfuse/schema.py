"""The Arrow columns of the data sets between the stages.

Lengths: T, the tokens of the row, including its start token and, at the document's end, its EOS; k,
`capture.top_k`, 0 with `signal: sampled`; m, `capture.draws`, 0 with `signal: top_k`. Position t of
a row predicts token t+1.
"""

import pyarrow as pa

SCHEMA_VERSION = 5
"""Of everything on disk. A change of names or columns needs a step in `storage/migrate.py`."""


def _list_of(kind: pa.DataType) -> pa.DataType:
    """Build a list type without nulls, which takes a third less time to read."""
    return pa.list_(pa.field("element", kind, nullable=False))


ints = _list_of(pa.int32())
halfs = _list_of(pa.float16())
codes = _list_of(pa.uint8())
flags = _list_of(pa.bool_())
floats = _list_of(pa.float32())

CORPUS = pa.schema(
    {
        "row_id": pa.string(),  # DOC_ID#INDEX, the row's index in its document
        "doc_id": pa.string(),
        "domain": pa.string(),  # "" without one
        "text": pa.string(),
        "num_bytes": pa.int32(),  # of the text in UTF-8
        "ends_document": pa.bool_(),  # the document's last row: its tokens end with EOS
        "target_ids": ints,  # T: the text in the target's tokens, as trained on
    }
)

MESSAGES = pa.field("messages", pa.string())
"""A column more of CORPUS rows of conversations: the messages, as JSON. The text is the answers end
to end, without anything between them, and `num_bytes` counts these alone."""

ANSWERS = pa.field("answers", ints)
"""A column more of CORPUS and CAPTURED rows of conversations. 3*A, flat, of the A answers of a row:
the first token of the answer, the token after its last one, and the one after the end of the turn;
the last two are equal if none is predicted. Only positions before these tokens have a signal."""

CAPTURED = pa.schema(
    {
        "row_id": pa.string(),  # as in the corpus, same order
        "token_ids": ints,  # T: the text in the source's own tokens; empty if rejected
        "top_ids": ints,  # T*k, flat: likeliest first; -1 beyond the vocabulary
        "top_logprobs": codes,  # T*k, flat: encode_probs; natural log, whole vocabulary
        "tail_logprobs": halfs,  # T: log of the mass outside the top k
        "draw_ids": ints,  # T*m, flat: distinct tokens sampled from that mass; -1 beyond them
        "draw_counts": codes,  # T*m, flat: how often each was sampled, m in all; mass / m a sample
        "next_logprobs": halfs,  # T: of the actual next token; 0 at the last position
        "nats": pa.float32(),  # -sum of next_logprobs over the text, without EOS; inf if rejected
    }
)

ALIGNED = pa.schema(
    {
        "row_id": pa.string(),
        "has_signal": flags,  # T, in the target's tokens: the source has a distribution here
        "top_ids": ints,  # T*(k+m), flat, target tokens: likeliest first, -1 beyond them
        "top_logprobs": codes,  # T*(k+m), flat
        "tail_logprobs": halfs,  # T
        "nats_per_byte": halfs,  # T: the source's NLL of token t+1's bytes, per byte
        "nats": pa.float32(),  # as captured
        "num_tokens": pa.int32(),  # the source's own tokens of the row's text, without EOS
    }
)

INSIDE_TOKEN = pa.field("inside_token", flags)
"""A column more of ALIGNED rows with `align.inside_tokens`. T: no source token starts here; the
position's signal is the distribution at the start of the source token around it, given the text up
to here. No token has ended here, so weights of sources may not change."""

TOKEN_NLL = pa.schema(
    {
        "row_id": pa.string(),  # as in the held-out rows, same order
        "ends": ints,  # the byte of the text after each token, without start token and EOS
        "nats": floats,  # of each of these tokens: -log of its probability
    }
)
