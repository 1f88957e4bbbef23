"""Fused rows -> a batch of tensors, as models and Hugging Face's Trainer take them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rayfuse.config.base import UserError
from rayfuse.interop.block import LEARNED

IGNORED = -100
"""The label of a token that is not learned, as in `transformers`."""

FUSED_COLUMNS = ("token_ids", "top_ids", "top_probs", "tail_probs", "sources")


def collate(rows: Sequence[Mapping[str, Any]], *, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Stack rows of the view `fused` into a batch, padded on the right.

    Args:
        rows: The rows, as `rayfuse.open_dataset` gives them.
        pad_id: The token of the padding, which is masked.

    Returns:
        `input_ids`, `attention_mask` and `labels` [batch, seq_len], as models of `transformers`
        take them (a label is the token itself; -100 for padding, for the first token of a row, and
        for what is not learned of a conversation),
        and for `rayfuse.fusion_loss` the fused distribution of the token that follows each:
        `top_ids` and `top_probs` [batch, seq_len, k], `tail_probs` and `sources` [batch, seq_len].

    Raises:
        UserError: The rows are none, or of another view.
    """
    if not rows or any(name not in rows[0] for name in FUSED_COLUMNS):
        given = ", ".join(rows[0]) if rows else "no rows"
        raise UserError(f"collate got {given}; it takes rows of the view 'fused'")
    lengths = torch.tensor([len(row["token_ids"]) for row in rows])
    entries = max(row["top_ids"].shape[1] for row in rows)
    size = (len(rows), int(lengths.max()))
    is_token = torch.arange(size[1]) < lengths[:, None]

    def stack(name: str, empty: int | float, *, entries: int | None = None) -> torch.Tensor:
        shape = size if entries is None else (*size, entries)
        stacked = np.full(shape, empty, dtype=rows[0][name].dtype)
        for number, row in enumerate(rows):
            value = row[name]
            part = stacked[number, : len(value)]
            (part if entries is None else part[:, : value.shape[1]])[...] = value
        return torch.from_numpy(stacked)

    input_ids = stack("token_ids", pad_id).long()
    labels = input_ids.masked_fill(~is_token, IGNORED)
    labels[:, :1] = IGNORED
    if LEARNED in rows[0]:
        labels[:, 1:] = labels[:, 1:].masked_fill(~stack(LEARNED, False)[:, :-1], IGNORED)
    return {
        "input_ids": input_ids,
        "attention_mask": is_token.long(),
        "labels": labels,
        "top_ids": stack("top_ids", -1, entries=entries),
        "top_probs": stack("top_probs", 0.0, entries=entries),
        "tail_probs": stack("tail_probs", 0.0),
        "sources": stack("sources", -1),
    }
