"""The held-out rows that training measures: a draw of all, or of those that choose the weights."""

import numpy as np
from jaxtyping import Int

from rayfuse.config.base import UserError
from rayfuse.config.train import TrainSettings
from rayfuse.corpus.split import is_for_selection
from rayfuse.storage.dataset import DataSet
from rayfuse.train.order import draw_rows


def choose_validation_rows(held_out: DataSet, settings: TrainSettings) -> Int[np.ndarray, "rows 2"]:
    """Draw `train.validation_rows` held-out rows, as (shard, row in shard).

    With `publish: best` they are rows of the documents that choose the weights.

    Raises:
        UserError: No document does.
        ShardError: A shard is missing or corrupt.
    """
    commits = held_out.commits()
    rows_per_shard = [commits[shard].rows for shard in sorted(commits)]
    if settings.publish == "last":
        return draw_rows(rows_per_shard, settings.validation_rows, seed=0)
    usable = [
        (shard, row)
        for shard in sorted(commits)
        for row, doc_id in enumerate(
            held_out.read_shard(commits[shard], ["doc_id"])["doc_id"].to_pylist()
        )
        if is_for_selection(doc_id)
    ]
    if not usable:
        raise UserError(
            "train.publish is best, but none of the held-out documents is in the half that chooses "
            "the weights; hold out more text, or set train.publish: last"
        )
    drawn = draw_rows([len(usable)], settings.validation_rows, seed=0)[:, 1]
    return np.array(usable, dtype=np.int64)[drawn]
