"""The off-by-one of FuseLLM's published code, reproduced for the study; rayfuse cannot produce it.

Where its aligner finds no source token for a target position, the released code stores a one-hot
distribution of the *current* token, although the position predicts the next one (FuseAI's issue
27). Without the fault it would be a one-hot of the next token, that is, plain language modelling:
this is rayfuse's behavior at positions without a signal.
"""

import numpy as np
import pyarrow as pa

from rayfuse.schema import codes, flags, halfs, ints
from rayfuse.storage.codec import LOWEST_LOGPROB, build_list_column, encode_probs, flatten_column


def teach_current_token(corpus: pa.Table, aligned: pa.Table) -> pa.Table:
    """Make every position of ALIGNED rows that has no signal predict its own token."""
    token_ids, offsets = flatten_column(corpus, "target_ids")
    has_signal = flatten_column(aligned, "has_signal")[0].copy()
    top_ids = flatten_column(aligned, "top_ids")[0].reshape(len(token_ids), -1).copy()
    differences = flatten_column(aligned, "top_logprobs")[0].reshape(top_ids.shape).copy()
    tails = flatten_column(aligned, "tail_logprobs")[0].copy()
    is_rejected = ~np.isfinite(aligned["nats"].to_numpy())
    faulty = ~has_signal & ~np.repeat(is_rejected, np.diff(offsets))
    one_hot = np.zeros((1, top_ids.shape[1]), dtype=np.float32)
    one_hot[0, 0] = 1
    top_ids[faulty] = -1
    top_ids[faulty, 0] = token_ids[faulty]
    differences[faulty] = encode_probs(one_hot).reshape(1, -1)
    tails[faulty] = LOWEST_LOGPROB
    has_signal |= faulty
    top_offsets = offsets * top_ids.shape[1]
    columns = {
        "has_signal": build_list_column(has_signal, offsets, flags),
        "top_ids": build_list_column(top_ids.reshape(-1), top_offsets, ints),
        "top_logprobs": build_list_column(differences.reshape(-1), top_offsets, codes),
        "tail_logprobs": build_list_column(tails, offsets, halfs),
    }
    table = aligned
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table
