"""What became of the documents: the totals of the corpus stage, and whether too many were lost."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.corpus.documents import UNREADABLE
from rayfuse.corpus.split import EMPTY, is_for_selection
from rayfuse.runtime.progress import CorpusPart
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.rejects import Reject

REJECTS_KEY = "rejects: "
"""The sums of a shard that begin so count its lost documents by kind."""

NUM_WORST = 3
"""Files that an error names."""

MAX_SHARDS_READ = 100
"""Shards whose rejects are read to name files."""


@dataclass(frozen=True)
class CorpusSummary:
    """Totals of one data set of rows, or of several."""

    files: int
    """Of documents, as listed."""
    documents: int
    """Those that became rows."""
    rows: int
    rejects: dict[str, int]
    """Documents that could not be used by kind, the most first; an unreadable file counts once."""

    @property
    def lost(self) -> int:
        """Documents that are rejected though they are not empty, in files that can be read."""
        return sum(self.rejects.values()) - self.rejects.get(EMPTY, 0) - self.unreadable

    @property
    def unreadable(self) -> int:
        """Files of which at least a part could not be read."""
        return self.rejects.get(UNREADABLE, 0)

    def describe_rejects(self) -> str:
        """List the kinds of rejects, for people."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.rejects.items()) or "none"

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {"files": self.files, "documents": self.documents, "rejects": self.rejects}


def count_documents(
    num_documents: int, num_bytes: int, rejects: Iterable[Reject]
) -> dict[str, float]:
    """Count the documents of a shard, for the sums of its commit record.

    Args:
        num_documents: Those that became rows.
        num_bytes: Of their text.
        rejects: The others.
    """
    counts: Counter[str] = Counter()
    for reject in rejects:
        counts[f"{REJECTS_KEY}{reject.kind}"] += reject.num_documents
    sums = {"documents": num_documents, "bytes": num_bytes} | counts
    return {name: float(value) for name, value in sums.items()}


def summarize(data_sets: Sequence[DataSet], num_files: int) -> CorpusSummary:
    """Add up the commit records of data sets of rows that were made from the same files.

    Raises:
        ShardError: A record is corrupt.
    """
    commits = [commit for data in data_sets for commit in data.commits().values()]
    rejects: Counter[str] = Counter()
    for commit in commits:
        for name, value in commit.stats.items():
            if name.startswith(REJECTS_KEY):
                rejects[name.removeprefix(REJECTS_KEY)] += int(value)
    return CorpusSummary(
        files=num_files,
        documents=int(sum(commit.stats.get("documents", 0.0) for commit in commits)),
        rows=sum(commit.rows for commit in commits),
        rejects=dict(rejects.most_common()),
    )


def check_rejects(data_sets: Sequence[DataSet], summary: CorpusSummary, max_share: float) -> None:
    """Check that not too many documents were rejected, nor files unreadable.

    Args:
        data_sets: The data sets of rows.
        summary: Their totals.
        max_share: `corpus.max_rejected_share`.

    Raises:
        UserError: Too many were; the message names the files with the most.
    """
    total = summary.documents + summary.lost
    if summary.unreadable > max_share * summary.files:
        what = f"{summary.unreadable} of {summary.files} files of documents cannot be read"
    elif summary.lost > max_share * total:
        what = f"{summary.lost} of {total} documents are rejected"
    else:
        return
    raise UserError(
        f"{what}, more than corpus.max_rejected_share ({max_share:.1%}): "
        f"{summary.describe_rejects()}; {_name_worst(data_sets)}; all reasons are in "
        f"{_name_folders(data_sets)}; correct or remove these files, or raise "
        "corpus.max_rejected_share"
    )


def _name_worst(data_sets: Sequence[DataSet]) -> str:
    """Name the files with the most rejects, unreadable ones first, each with a reason."""
    counts: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    unreadable: set[str] = set()
    for data in data_sets:
        commits = [commit for commit in data.commits().values() if commit.rejects]
        for commit in commits[:MAX_SHARDS_READ]:
            for reject in data.read_rejects(commit):
                if reject.kind == UNREADABLE:
                    unreadable.add(reject.file)
                    reasons[reject.file] = reject.reason
                if reject.kind != EMPTY:
                    counts[reject.file] += reject.num_documents
                    reasons.setdefault(reject.file, reject.reason)
    worst = sorted(counts, key=lambda file: (file not in unreadable, -counts[file], file))
    named = [f"{file} ({counts[file]}: {reasons[file]})" for file in worst[:NUM_WORST]]
    return "the most are from " + ", ".join(named)


def check_has_text(data_sets: Sequence[DataSet], summary: CorpusSummary) -> None:
    """Check that any document became rows.

    Args:
        data_sets: The data sets of rows.
        summary: Their totals.

    Raises:
        UserError: None did.
    """
    if not summary.documents:
        raise UserError(
            f"the documents hold no usable text: {sum(summary.rejects.values())} documents "
            f"rejected ({summary.describe_rejects()}; reasons in {_name_folders(data_sets)}); "
            "check the paths and the `text` setting"
        )


def check_halves(held_out: DataSet) -> None:
    """Check that held-out documents are in both halves, where one chooses the weights.

    Raises:
        UserError: All are in one half.
        ShardError: A shard is missing or corrupt.
    """
    found: set[bool] = set()
    num_documents = 0
    commits = held_out.commits()
    for shard in sorted(commits):
        names = set(held_out.read_shard(commits[shard], ["doc_id"])["doc_id"].to_pylist())
        num_documents += len(names)
        found |= {is_for_selection(name) for name in names}
        if len(found) == 2:
            return
    raise UserError(
        f"train.publish is best, which divides the held-out documents into two halves by their "
        f"ids, but one half has none of the {num_documents}; hold out more documents, or set "
        "train.publish to last"
    )


def check_held_out_share(part: CorpusPart, num_rows: int, num_documents: int, share: float) -> None:
    """Check that a part of the documents has rows, where the share divides them.

    Args:
        part: The part.
        num_rows: Its rows.
        num_documents: Documents of both parts.
        share: `evaluate.held_out_share`.

    Raises:
        UserError: It has none.
    """
    if num_rows:
        return
    remedy = "name documents to evaluate on in evaluate.documents"
    if num_documents > 1:
        enough = min(0.5, math.ceil(1000 / num_documents) / 100)  # e^-10: none of them
        remedy = f"set it to {enough:g}, or {remedy}"
    which = "none of" if part == "held-out" else "all of"
    raise UserError(
        f"evaluate.held_out_share is {share:g}, by which {which} the {num_documents} documents "
        f"are held out for evaluation; {remedy}"
    )


def _name_folders(data_sets: Sequence[DataSet]) -> str:
    return " and ".join(f"{data.store.root}/{data.folder}/rejects" for data in data_sets)
