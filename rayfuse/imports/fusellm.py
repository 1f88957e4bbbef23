"""FuseLLM's stores: Hugging Face data sets of the capture stage, or of the alignment stage.

The layout is that of fanqiwan/FuseLLM, `forward_for_logits.py` and `token_alignment.py`. Logits
are raw: without their normaliser, the mass outside the top k is unknown. `per_step_metric_ce`, if
it was saved, gives the next token's own log-probability, and with it the normaliser where that
token is in the top k. `metric_ce` alone gives the row's mean.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from rayfuse.imports.distillkit import MIN_TAIL
from rayfuse.imports.record import ForeignRow, clip_ids, sort_entries
from rayfuse.imports.tables import count_entries, flatten_list, flatten_lists

CAPTURED = ("per_step_indices", "per_step_logits")
METRIC, STEP_METRIC = "metric_ce", "per_step_metric_ce"

FALLBACK_LOGIT = 1.0
"""The logit of an aligned position without a match, whose only entry is the current token."""

MAX_TAIL = 0.999
"""The largest tail mass that is derived."""


@dataclass(frozen=True)
class FuseLLMFormat:
    """Raw logits of the top k, at the positions of `input_ids`, padding behind them."""

    top_k: int
    columns: tuple[str, ...]
    """Indices and logits first, then the metric if there is one."""
    name: str

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the store does not have, each with what is done about it."""
        common = ("a distribution before the first token: that position has no signal",)
        if STEP_METRIC in self.columns:
            return (
                "the normaliser: from the next token's own loss where that token is in the top k, "
                "elsewhere by the row's mean tail",
                *common,
            )
        nll = (
            "the next token's log-probability where it is not in the top k: so that the row's mean "
            "is metric_ce"
            if METRIC in self.columns
            else "the next token's log-probability where it is not in the top k: that of the "
            "least likely entry"
        )
        return (
            "the normaliser: the top k are given all of the mass, as FuseLLM does",
            nll,
            *common,
        )

    def decode(self, table: pa.Table, row: int) -> ForeignRow:
        """Decode the distributions of a row.

        Raises:
            ValueError: Indices and logits have other lengths, or logits are not finite.
        """
        own_ids = flatten_list(table["input_ids"][row]).astype(np.int64)
        ids, logits = self._read_logits(table, row, len(own_ids))
        is_entry = ids >= 0
        if not np.isfinite(logits[is_entry]).all():
            raise ValueError("logits are not finite")
        if self.columns[1] != CAPTURED[1]:  # a position that was not aligned repeats its own token
            is_single = is_entry.sum(axis=1) == 1
            is_entry[is_single & (ids[:, 0] == own_ids) & (logits[:, 0] == FALLBACK_LOGIT)] = False
            ids = np.where(is_entry, ids, -1)
        logits = np.where(is_entry, logits, -np.inf)
        ids, logits = sort_entries(ids, logits)
        following = np.append(own_ids[1:], -2)
        if STEP_METRIC in self.columns:
            losses = flatten_list(table[STEP_METRIC][row])[: len(own_ids) - 1].astype(np.float64)
            if len(losses) != len(own_ids) - 1 or not np.isfinite(losses).all():
                raise ValueError(f"{STEP_METRIC} is not finite, or has not as many as the text")
            return normalise_by_losses(ids, logits, following, losses)
        mean = table[METRIC][row].as_py() if METRIC in self.columns else None
        if METRIC in self.columns and (mean is None or not np.isfinite(mean)):
            raise ValueError(f"{METRIC} is {'null' if mean is None else mean}")
        return renormalise(ids, logits, following, mean if mean is None else float(mean))

    def _read_logits(
        self, table: pa.Table, row: int, num_tokens: int
    ) -> tuple[Int[np.ndarray, "tokens entries"], Float[np.ndarray, "tokens entries"]]:
        """Read ragged lists into arrays of equal rows, without the padding behind the text."""
        (ids, lengths), (logits, others) = (
            flatten_lists(table[name][row]) for name in self.columns[:2]
        )
        if not np.array_equal(lengths, others) or len(lengths) < num_tokens:
            raise ValueError("indices and logits have other lengths than the text")
        lengths = lengths[:num_tokens]
        shape = (num_tokens, max(self.top_k, lengths.max(initial=0)))
        is_entry = np.arange(shape[1]) < lengths[:, None]
        full_ids, full_logits = np.full(shape, -1, np.int64), np.full(shape, -np.inf)
        full_ids[is_entry], full_logits[is_entry] = ids[: lengths.sum()], logits[: lengths.sum()]
        return full_ids, full_logits


def find_format(
    columns: frozenset[str], first: pa.Table, aligned: int | None
) -> FuseLLMFormat | None:
    """Recognise a store by the columns of its first file; None if it is another tool's.

    Args:
        columns: The file's.
        first: The file.
        aligned: The number of the aligned source; None for the store's own model.
    """
    suffix = "" if aligned is None else f"_aligned_{aligned}"
    indices, logits = (
        name if aligned is None else name.replace("per_step_", "per_step_aligned_") + f"_{aligned}"
        for name in CAPTURED
    )
    if not columns.issuperset((indices, logits)):
        return None
    # The metric of an aligned source counts that source's own tokens, which are not stored.
    metrics = [] if suffix else [name for name in (STEP_METRIC, METRIC) if name in columns][:1]
    what = "captured logits" if aligned is None else f"aligned logits of source {aligned}"
    return FuseLLMFormat(
        count_entries(first, logits), (indices, logits, *metrics), f"FuseLLM, {what}"
    )


def _log_sum(logits: Float[np.ndarray, "tokens entries"]) -> Float[np.ndarray, " tokens"]:
    """Compute the log of the sum of exponentials of each row; 0 for rows without entries."""
    highest = logits.max(axis=1, initial=-np.inf)
    has_entry = np.isfinite(highest)
    shift = np.where(has_entry, highest, 0.0)
    sums = np.exp(logits - shift[:, None]).sum(axis=1)
    return np.where(has_entry, shift + np.log(np.maximum(sums, 1e-300)), 0.0)


def normalise_by_losses(
    ids: Int[np.ndarray, "tokens entries"],
    logits: Float[np.ndarray, "tokens entries"],
    following: Int[np.ndarray, " tokens"],
    losses: Float[np.ndarray, " tokens_less_1"],
) -> ForeignRow:
    """Derive normaliser and tail from the next token's own loss.

    Where the next token is an entry, normaliser = its logit + its loss. Elsewhere the tail is the
    mean over the positions of the row where it is known, and at least the next token's.

    Args:
        ids: Sorted by logit; -1 where there is no entry.
        logits: -inf where there is no entry.
        following: The token after each; one that does not exist after the last.
        losses: Nats of each next token.
    """
    inside = _log_sum(logits)
    is_next = (ids == following[:, None]) & (ids >= 0)
    known = is_next[:-1].any(axis=1)
    own = np.where(is_next, logits, 0.0).sum(axis=1)[:-1]
    tails = 1 - np.exp(np.where(known, inside[:-1] - own - losses, 0.0))
    tails = np.clip(tails, MIN_TAIL, MAX_TAIL)
    mean = float(tails[known].mean()) if known.any() else MIN_TAIL
    tails = np.where(known, tails, np.clip(np.maximum(mean, np.exp(-losses)), MIN_TAIL, MAX_TAIL))
    return _build(ids, logits, inside, np.append(tails, mean), np.append(-losses, 0.0))


def renormalise(
    ids: Int[np.ndarray, "tokens entries"],
    logits: Float[np.ndarray, "tokens entries"],
    following: Int[np.ndarray, " tokens"],
    mean_nll: float | None,
) -> ForeignRow:
    """Give the entries all of the mass, and each next token outside of them an equal NLL.

    Args:
        ids: Sorted by logit; -1 where there is no entry.
        logits: -inf where there is no entry.
        following: The token after each; one that does not exist after the last.
        mean_nll: Nats per token of the row, to which the NLL adds up; None if it is unknown.
    """
    inside = _log_sum(logits)
    has_entry = ids[:, 0] >= 0
    is_next = (ids == following[:, None]) & (ids >= 0)
    found: Bool[np.ndarray, " tokens"] = is_next.any(axis=1)
    own = np.where(is_next, logits, 0.0).sum(axis=1) - inside
    num_entries = (ids >= 0).sum(axis=1)
    least = np.take_along_axis(logits, np.maximum(num_entries - 1, 0)[:, None], 1)[:, 0] - inside
    missing = ~found & has_entry
    missing[-1:] = False
    share = 0.0
    if mean_nll is not None and missing.any():
        share = (mean_nll * (len(ids) - 1) + own[:-1][found[:-1]].sum()) / missing.sum()
    next_logprobs = np.where(found, own, np.where(missing, np.minimum(least, -share), np.nan))
    return _build(ids, logits, inside, np.full(len(ids), MIN_TAIL), next_logprobs)


def _build(
    ids: Int[np.ndarray, "tokens entries"],
    logits: Float[np.ndarray, "tokens entries"],
    inside: Float[np.ndarray, " tokens"],
    tails: Float[np.ndarray, " tokens"],
    next_logprobs: Float[np.ndarray, " tokens"],
) -> ForeignRow:
    scale = np.log1p(-tails) - inside
    return ForeignRow(clip_ids(ids), logits + scale[:, None], np.log(tails), next_logprobs)
