"""What models pay for held-out documents, in bits per byte, and how sure a difference is.

Bytes are the same for every tokenizer, so bits per byte compare where nats per token do not.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

ALL = "all"
"""The group of all documents. A domain of this very name is not shown apart."""

MIN_DOCUMENTS = 6
"""Fewer than this, and by chance alone all differ in one direction more than once in 20 times."""

CHUNK_DRAWS = 4_000_000
"""Documents drawn at a time in the bootstrap: 100 MB."""

Role = Literal["source", "ensemble", "merged", "target", "clm", "fused"]

OWN_ROLES: dict[str, Role] = {
    "ensemble": "ensemble",
    "merged": "merged",
    "target": "target",
    "clm": "clm",
    "fused": "fused",
}
"""Names that no source may have, and what they stand for."""


@dataclass(frozen=True)
class DocumentScore:
    """What one model pays for one document."""

    doc_id: str
    domain: str
    num_bytes: int
    """Of the text in UTF-8."""
    nats: float
    """-log of the probability that the model gives the text."""


@dataclass(frozen=True)
class Evaluation:
    """One model on all held-out documents."""

    name: str
    """What the model is called in tables."""
    role: Role
    model: str
    """Folder or hub id; of the ensemble, the sources' names."""
    documents: list[DocumentScore]
    seconds: float
    """Of computing, loading included, summed over tasks."""

    def to_json(self) -> bytes:
        """Return the result file."""
        record = asdict(self) | {"bits_per_byte": bits_per_byte(self.documents)}
        return json.dumps(record, indent=1).encode()


def parse_evaluation(data: bytes) -> Evaluation:
    """Return the evaluation that a result file holds."""
    record: dict[str, Any] = json.loads(data)
    return Evaluation(
        name=record["name"],
        role=record["role"],
        model=record["model"],
        documents=[DocumentScore(**document) for document in record["documents"]],
        seconds=record["seconds"],
    )


def find_role(name: str) -> Role:
    """Return what a model is in the run, by its name in tables."""
    return OWN_ROLES.get(name, "source")


def sum_documents(rows: Iterable[DocumentScore]) -> list[DocumentScore]:
    """Return one score per document from the scores of its rows, in order of first appearance."""
    totals: dict[tuple[str, str], tuple[int, float]] = {}
    for row in rows:
        num_bytes, nats = totals.get((row.doc_id, row.domain), (0, 0.0))
        totals[row.doc_id, row.domain] = (num_bytes + row.num_bytes, nats + row.nats)
    return [
        DocumentScore(doc_id, domain, num_bytes, nats)
        for (doc_id, domain), (num_bytes, nats) in totals.items()
    ]


def bits_per_byte(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """Return sum(nats) / ln 2 / sum(bytes) of all documents and of each domain, by name.

    Raises:
        ValueError: There are no documents.
    """
    nats = np.array([score.nats for score in scores])
    num_bytes = np.array([score.num_bytes for score in scores])
    return {
        group: float(nats[index].sum() / math.log(2) / num_bytes[index].sum())
        for group, index in _group_documents(scores).items()
    }


def count_bytes(scores: Sequence[DocumentScore]) -> dict[str, int]:
    """Return the bytes of all documents and of each domain.

    Raises:
        ValueError: There are no documents.
    """
    num_bytes = np.array([score.num_bytes for score in scores])
    groups = _group_documents(scores)
    return {group: int(num_bytes[index].sum()) for group, index in groups.items()}


@dataclass(frozen=True)
class Difference:
    """How much more one model pays than another, in bits per byte, with its 95 % interval."""

    difference: float
    low: float
    """-inf where there are too few documents to tell."""
    high: float
    num_documents: int
    higher_is_better: bool = False
    """Of a score that is no cost."""

    @property
    def outcome(self) -> Literal["better", "worse", "unclear"]:
        """What may be claimed of the first model; unclear where the interval holds zero."""
        if self.low <= 0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0) == self.higher_is_better else "worse"


def compare(a: Evaluation, b: Evaluation, *, samples: int, seed: int) -> dict[str, Difference]:
    """Return by how much `a` pays more than `b`, on all documents and on each domain.

    The interval is that of a paired bootstrap over documents: documents are drawn
    with replacement, both models pay for the same draw, and the middle 95 % of the differences
    count. It covers the choice of documents, not another training with another seed.

    Args:
        a: The model in question.
        b: What it is compared with.
        samples: Resamples of the documents.
        seed: Of the resampling.

    Raises:
        ValueError: The models were not scored on the same documents, or on none.
    """
    keys_a, keys_b = ([(d.doc_id, d.domain, d.num_bytes) for d in e.documents] for e in (a, b))
    if keys_a != keys_b:
        raise ValueError(
            f"{a.name} and {b.name} were scored on different documents ({len(keys_a)} and "
            f"{len(keys_b)}); delete both result files and evaluate again"
        )
    nats_a, nats_b = (np.array([d.nats for d in e.documents]) for e in (a, b))
    bits = (nats_a - nats_b) / math.log(2)
    num_bytes = np.array([document.num_bytes for document in a.documents])
    return {
        group: bootstrap(bits[index], num_bytes[index], samples=samples, seed=seed)
        for group, index in _group_documents(a.documents).items()
    }


def bootstrap(
    values: Float[np.ndarray, " documents"],
    weights: Float[np.ndarray, " documents"] | Int[np.ndarray, " documents"],
    *,
    samples: int,
    seed: int,
) -> Difference:
    """Return sum(values) / sum(weights) and the middle 95 % of it over resamples of documents.

    Args:
        values: Of each document, by how much one model differs from another: bits.
        weights: What they are divided by: bytes.
        samples: Resamples.
        seed: Of the resampling.
    """
    num_documents = len(values)
    difference = float(values.sum() / weights.sum())
    if num_documents < MIN_DOCUMENTS:
        return Difference(difference, -math.inf, math.inf, num_documents)
    draw = np.random.default_rng(seed)
    step = max(1, CHUNK_DRAWS // num_documents)
    found: list[Float[np.ndarray, " step"]] = []
    for start in range(0, samples, step):
        shape = (min(step, samples - start), num_documents)
        chosen = draw.integers(0, num_documents, shape)
        found.append(values[chosen].sum(axis=1) / weights[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return Difference(difference, float(low), float(high), num_documents)


def _group_documents(
    scores: Sequence[DocumentScore],
) -> dict[str, Int[np.ndarray, " documents"]]:
    """Return which documents are in `all` and in each domain; domains sorted by name."""
    if not scores:
        raise ValueError("there are no held-out documents; raise evaluate.held_out_share")
    domains = np.array([score.domain for score in scores], dtype=object)
    groups = {ALL: np.arange(len(scores))}
    for domain in sorted(set(domains)):
        groups.setdefault(domain, np.flatnonzero(domains == domain))
    return groups
