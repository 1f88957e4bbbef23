"""Records of a smaller k, made from one capture of the largest."""

from dataclasses import replace

import numpy as np

from rayfuse.capture.engines.base import Failure
from rayfuse.capture.top_k import TopLogprobs


def keep_fewer(record: TopLogprobs | Failure, top_k: int) -> TopLogprobs | Failure:
    """Reduce a record to the one that a smaller top_k would have made."""
    if isinstance(record, Failure):
        return record
    logprobs = record.top_logprobs[:, :top_k]
    head = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    tails = np.log(np.maximum(1 - head, 1e-7)).astype(np.float32)
    return replace(
        record, top_ids=record.top_ids[:, :top_k], top_logprobs=logprobs, tail_logprobs=tails
    )
