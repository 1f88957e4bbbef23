"""Scores of models on held-out documents, in bits per byte, and their differences.

The number of bytes does not depend on the tokenizer, so bits per byte compare models that nats per
token do not.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Int

from rayfuse.config.base import UserError
from rayfuse.corpus.split import is_for_selection
from rayfuse.evaluate.bootstrap import Difference, bootstrap
from rayfuse.storage.seal import seal, unseal

ALL = "all"
"""The group of all documents. A domain with this name has no group of its own."""

OTHER = "other domains"
"""The group of the documents of all but the largest domains."""

MAX_DOMAINS = 30
"""Domains that have a group of their own, the largest ones: each costs a bootstrap for every
baseline and a column of the table, and documents may name as many domains as they like."""

Role = Literal["source", "ensemble", "merged", "target", "clm", "fused"]

OWN_ROLES: dict[str, Role] = {
    "ensemble": "ensemble",
    "merged": "merged",
    "target": "target",
    "clm": "clm",
    "fused": "fused",
}
"""Reserved names, which no source may have, and the role of each."""


@dataclass(frozen=True)
class DocumentScore:
    """The negative log-likelihood of one document under one model."""

    doc_id: str
    domain: str
    num_bytes: int
    """Length of the text in UTF-8."""
    nats: float
    """-log of the probability that the model assigns to the text."""


@dataclass(frozen=True)
class Evaluation:
    """One model on all held-out documents."""

    name: str
    """The model's name in tables."""
    role: Role
    model: str
    """Folder or hub id; for the ensemble, the sources' names."""
    documents: list[DocumentScore]
    seconds: float
    """Computing time, loading included, summed over tasks."""
    inputs: dict[str, str] = field(default_factory=dict[str, str])
    """Hashes of the held-out rows, and of a model that the run has made: see `evaluate.results`."""

    def to_json(self) -> bytes:
        """Encode the result file."""
        return seal(asdict(self) | {"bits_per_byte": bits_per_byte(self.documents)})


def parse_evaluation(data: bytes, path: str = "the result") -> Evaluation:
    """Decode a result file.

    Args:
        data: Its bytes.
        path: Its path or URI, for errors.

    Raises:
        ShardError: It is corrupt.
    """
    record = unseal(data, path)
    return Evaluation(
        name=record["name"],
        role=record["role"],
        model=record["model"],
        documents=[DocumentScore(**document) for document in record["documents"]],
        seconds=record["seconds"],
        inputs=record["inputs"],
    )


def keep_compared(evaluation: Evaluation) -> Evaluation:
    """Keep the documents that choose no weights: models are compared on these."""
    kept = [score for score in evaluation.documents if not is_for_selection(score.doc_id)]
    return replace(evaluation, documents=kept)


def find_role(name: str) -> Role:
    """Look up a model's role in the run by its name in tables."""
    return OWN_ROLES.get(name, "source")


def bits_per_byte(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """Compute sum(nats) / ln 2 / sum(bytes) of all documents and of each large domain, by group.

    Raises:
        UserError: There are no documents.
    """
    nats = np.array([score.nats for score in scores])
    num_bytes = np.array([score.num_bytes for score in scores])
    return {
        group: float(nats[index].sum() / math.log(2) / num_bytes[index].sum())
        for group, index in _group_documents(scores).items()
    }


def count_bytes(scores: Sequence[DocumentScore]) -> dict[str, int]:
    """Count the bytes of all documents and of each large domain, by group.

    Raises:
        UserError: There are no documents.
    """
    num_bytes = np.array([score.num_bytes for score in scores])
    groups = _group_documents(scores)
    return {group: int(num_bytes[index].sum()) for group, index in groups.items()}


def compare_evaluations(
    a: Evaluation, b: Evaluation, *, samples: int, seed: int
) -> dict[str, Difference]:
    """Compute by how many bits per byte `a` exceeds `b`, on all documents and on each large domain.

    The interval is that of a paired bootstrap over documents; see `bootstrap`. It covers the choice
    of documents, not a second training with another seed.

    Args:
        a: The model in question.
        b: The model that it is compared with.
        samples: Number of resamples of the documents.
        seed: Seed of the resampling.

    Raises:
        UserError: The models were not scored on the same documents, or on none.
    """
    keys_a, keys_b = ([(d.doc_id, d.domain, d.num_bytes) for d in e.documents] for e in (a, b))
    if keys_a != keys_b:
        raise UserError(
            f"{a.name} and {b.name} were scored on different documents ({len(keys_a)} and "
            f"{len(keys_b)}); delete both result files and run `rayfuse evaluate`"
        )
    nats_a, nats_b = (np.array([d.nats for d in e.documents]) for e in (a, b))
    bits = (nats_a - nats_b) / math.log(2)
    num_bytes = np.array([document.num_bytes for document in a.documents])
    return {
        group: bootstrap(bits[index], num_bytes[index], samples=samples, seed=seed)
        for group, index in _group_documents(a.documents).items()
    }


def _group_documents(
    scores: Sequence[DocumentScore],
) -> dict[str, Int[np.ndarray, " documents"]]:
    """List the indices of all documents, of each large domain's, sorted by name, and the rest."""
    if not scores:
        raise UserError("there are no held-out documents; raise evaluate.held_out_share")
    sizes: Counter[str] = Counter()
    for score in scores:
        sizes[score.domain] += score.num_bytes
    members: dict[str, list[int]] = {name: [] for name in [*choose_domains(sizes), OTHER]}
    for index, score in enumerate(scores):
        members.get(score.domain, members[OTHER]).append(index)
    groups = {ALL: np.arange(len(scores))}
    for name, indices in members.items():
        if indices:
            groups.setdefault(name, np.array(indices))
    return groups


def choose_domains(sizes: Mapping[str, int]) -> list[str]:
    """Choose the `MAX_DOMAINS` largest domains, and sort them by name; the rest is `OTHER`."""
    return sorted(sorted(sizes, key=lambda name: (-sizes[name], name))[:MAX_DOMAINS])
