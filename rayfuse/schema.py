"""The Arrow columns of every data set between two stages, and the one codec of log-probabilities.

Length words: T, the tokens of the row (its start token and, where the document ends, its EOS
included); k, `capture.top_k`, none for `signal: sampled`; m, `capture.draws`, none for `signal:
top_k`. Position t of a row always speaks of token t+1.
"""

import pyarrow as pa

SCHEMA_VERSION = 5


def _list_of(kind: pa.DataType) -> pa.DataType:
    """Return the type of lists without gaps: a third less time to read than of lists with."""
    return pa.list_(pa.field("element", kind, nullable=False))


ints = _list_of(pa.int32())
halfs = _list_of(pa.float16())
codes = _list_of(pa.uint8())
flags = _list_of(pa.bool_())
floats = _list_of(pa.float32())

CORPUS = pa.schema(
    {
        "row_id": pa.string(),  # DOC_ID#PLACE, the row's place in its document
        "doc_id": pa.string(),
        "domain": pa.string(),  # "" where the documents name none
        "text": pa.string(),
        "num_bytes": pa.int32(),  # of the text in UTF-8
        "ends_document": pa.bool_(),  # the document's last row: its tokens end with EOS
        "target_ids": ints,  # T: the text in the target's tokens, as trained on
    }
)

CAPTURED = pa.schema(
    {
        "row_id": pa.string(),  # as in the corpus, same order
        "token_ids": ints,  # T: the text in the source's own tokens; empty if rejected
        "top_ids": ints,  # T*k, flat: likeliest first; -1 beyond the vocabulary
        "top_logprobs": codes,  # T*k, flat: encode_logprobs; natural log, whole vocabulary
        "tail_logprobs": halfs,  # T: log of the mass outside the top k
        "draw_ids": ints,  # T*m, flat: tokens drawn from that mass, each once; -1 beyond them
        "draw_counts": codes,  # T*m, flat: how often each was drawn, m in all: mass / m each time
        "next_logprobs": halfs,  # T: of the token that really comes next; 0 at the last
        "nats": pa.float32(),  # -sum of next_logprobs over the text, EOS left out; inf if rejected
    }
)

ALIGNED = pa.schema(
    {
        "row_id": pa.string(),
        "has_signal": flags,  # T, in the target's tokens: the source says something here
        "top_ids": ints,  # T*(k+m), flat, target tokens: likeliest first, -1 beyond them
        "top_logprobs": codes,  # T*(k+m), flat
        "tail_logprobs": halfs,  # T
        "nats_per_byte": halfs,  # T: the source's cost of token t+1's bytes, per byte
        "nats": pa.float32(),  # as captured
        "num_tokens": pa.int32(),  # the source's own tokens of the row's text, EOS left out
    }
)

TOKEN_NLL = pa.schema(
    {
        "row_id": pa.string(),  # as in the held-out rows, same order
        "ends": ints,  # the byte of the text after each token: start token and EOS left out
        "nats": floats,  # of each of these tokens: -log of its probability
    }
)
