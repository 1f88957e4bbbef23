"""Stored rows for other trainers: one data set, as Hugging Face, PyTorch, Ray or pandas."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.config.train import value_at
from rayfuse.fuse.reader import ShardOpener
from rayfuse.interop.find import RunData, find_run
from rayfuse.interop.views import (
    AlignedReader,
    CapturedReader,
    FusedReader,
    RowReader,
    View,
    check_view,
    read_rows,
    read_table,
)
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.runtime.connect import join_cluster
from rayfuse.storage.dataset import DataSet

if TYPE_CHECKING:
    import datasets
    import pandas as pd

    from rayfuse.interop import ray_data, torch_rows


@dataclass(frozen=True)
class RowDataset:
    """Rows of a run in one view. Made by `rayfuse.open_dataset` and `Run.open_dataset`.

    Iterating yields the rows as they are stored, each a dictionary with `row_id` and, by the view:

    - `captured`, in the source's own tokens: `token_ids` [T], `top_ids` and `top_logprobs` [T, k],
      `tail_logprobs` [T], `draw_ids` and `draw_counts` [T, m], `next_logprobs` [T], `nats`.
    - `aligned`, in the target's tokens: `token_ids` [T], `has_signal` [T], `top_ids` and
      `top_logprobs` [T, k], `tail_logprobs` [T], `nats_per_byte` [T], `nats`, `num_tokens`.
    - `fused`: `token_ids` [T], `top_ids` and `top_probs` [T, k], `tail_probs` [T], `sources` [T].

    Position t predicts token t+1. Logs are natural. An entry that does not exist has the id -1. A
    row that its source rejected has no tokens in `captured`, and infinite `nats`. `sources` is the
    number of the active source with the lowest NLL, -1 without a signal. The other columns are
    those of `rayfuse/schema.py`.
    """

    view: View
    recipe: Recipe = field(repr=False)
    """The resolved recipe of the run."""
    reader: RowReader = field(repr=False)

    def __len__(self) -> int:
        return sum(self.reader.rows_per_shard)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard, num_rows in enumerate(self.reader.rows_per_shard):
            yield from read_rows(self.reader, shard, np.arange(num_rows))

    def to_huggingface(self, *, seed: int | None = 0) -> "datasets.IterableDataset":
        """Stream the rows as a `datasets.IterableDataset`.

        The order of the shards and of the rows within each is a function of the seed and of
        `set_epoch`. `datasets.distributed.split_dataset_by_node` and the workers of a DataLoader
        get shards of their own (or rows, where the nodes do not divide the number of shards).
        `state_dict` and `load_state_dict` resume at the next row, after reading one shard again;
        the epoch must be the same.

        Args:
            seed: Of the order; None for the order in which rows are stored, in every epoch.
        """
        from rayfuse.interop.hugging_face import stream_rows

        return stream_rows(self.reader, seed)

    def to_torch(self) -> "torch_rows.NumberedRows":
        """Give the rows by their number, as a `torch.utils.data.Dataset`.

        It suits any sampler, but a random one opens shards at random: use it for data that a few
        open shards hold, and `to_huggingface` for more.
        """
        from rayfuse.interop.torch_rows import NumberedRows

        return NumberedRows(self.reader)

    def to_ray(self) -> "ray_data.Dataset":
        """Read the rows as a Ray Dataset, a task for each shard, on the cluster of RAY_ADDRESS."""
        join_cluster()  # before ray is imported: it reads the environment
        from rayfuse.interop.ray_data import read_shards

        return read_shards(self.reader)

    def to_pandas(self, *, max_rows: int | None = None) -> "pd.DataFrame":
        """Read the rows into a data frame.

        Args:
            max_rows: The first rows alone; all of them by default.
        """
        tables: list[pa.Table] = []
        wanted = len(self) if max_rows is None else min(max_rows, len(self))
        for shard in range(len(self.reader.rows_per_shard)):
            if wanted <= 0 and tables:
                break
            tables.append(read_table(self.reader, shard).slice(0, wanted))
            wanted -= tables[-1].num_rows
        return pa.concat_tables(tables, promote_options="default").to_pandas()

    def loss_settings(self, done: float = 0.0) -> dict[str, Any]:
        """Return the run's settings of the loss, as keywords of `rayfuse.fusion_loss`.

        Args:
            done: Completed share of the training, 0 at the first step and 1 at the last, for
                settings that change in its course.

        Raises:
            UserError: The rows are not fused.
        """
        if not isinstance(self.reader, FusedReader):
            raise UserError(
                f"view is {self.view!r}, which is not trained on; open the view 'fused'"
            )
        train = self.recipe.train
        return {
            "clm_weight": value_at(train.clm_weight, done),
            "divergence": train.divergence,
            "temperature": value_at(train.temperature, done),
            "skew": train.skew,
        }


def open_dataset(
    uri: "str | os.PathLike[str]", view: View = "fused", *, source: str | None = None
) -> RowDataset:
    """Open stored rows; neither the sources nor the documents need to be there.

    Args:
        uri: The storage of a run, or a folder in it: of a data set, or of a training. A folder's
            recipe decides how rows are fused; for a storage, all its recipes must agree.
        view: `captured`, `aligned`, or `fused`, which fuses as it reads and needs the target's
            tokenizer.
        source: The source, for the views of one source, where there are several; by default that
            of the folder.

    Raises:
        UserError: There is no such run, view or source, rows are incomplete, or the storage has
            several recipes.
        ShardError: A record is corrupt.
    """
    return build_dataset(find_run(uri), view, source)


def build_dataset(run: RunData, view: View, source: str | None) -> RowDataset:
    """Build the data set of a view from a run's data sets.

    Raises:
        UserError: There is no such view or source, or rows are incomplete.
        ShardError: A record is corrupt.
    """
    check_view(view)
    names = [known.name for known in run.recipe.sources]
    if view == "fused":
        if source is not None:
            raise UserError(f"source is {source!r}, but view 'fused' is of all sources; remove it")
        aligned = {name: _find(run.aligned, name, "align") for name in names}
        token_bytes = load_recipe_tokenizer(run.recipe.target).count_bytes()
        opener = ShardOpener(
            _find_corpus(run),
            aligned,
            run.recipe.fuse,
            token_bytes,
            learns_context=run.recipe.train.loss_on == "all",
        )
        return RowDataset(view, run.recipe, FusedReader(opener))
    chosen = _choose_source(names, source or run.source)
    if view == "captured":
        captured = _find(run.captured, chosen, "capture")
        return RowDataset(view, run.recipe, CapturedReader(captured, captured.commits()))
    corpus, data = _find_corpus(run), _find(run.aligned, chosen, "align")
    reader = AlignedReader(corpus, data, corpus.commits(), data.commits())
    return RowDataset(view, run.recipe, reader)


def _choose_source(names: list[str], source: str | None) -> str:
    if source is None and len(names) > 1:
        raise UserError(f"there are several sources; give one as source: {', '.join(names)}")
    if source is not None and source not in names:
        raise UserError(f"source is {source!r}, which is none; sources: {', '.join(names)}")
    return source or names[0]


def _find_corpus(run: RunData) -> DataSet:
    found = {} if run.corpus is None else {"corpus": run.corpus}
    return _find(found, "corpus", "corpus")


def _find(found: dict[str, DataSet], name: str, stage: str) -> DataSet:
    data = found.get(name)
    if data is None or data.read_manifest() is None:
        what = name if data is None else data.folder
        raise UserError(f"the rows of {what} are incomplete; run `rayfuse {stage}` first")
    return data
