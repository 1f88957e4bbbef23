"""The rows and documents of a shard that could not be used, as JSON Lines."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Reject:
    """A row or document that could not be used."""

    name: str
    reason: str
    """Its kind and, after a colon, the details."""
    file: str = ""
    """The file of documents that it comes from, where it is known."""
    num_documents: int = 1
    """How many documents it stands for."""

    @property
    def kind(self) -> str:
        """The part of the reason that many rejects have in common."""
        return self.reason.partition(":")[0]


def encode_rejects(rejects: Iterable[Reject]) -> bytes:
    """Encode rejects, without the file and the number of those that have none."""
    usual = {"file": "", "num_documents": 1}
    records = [dict(asdict(reject).items() - usual.items()) for reject in rejects]
    return "".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode()


def decode_rejects(data: bytes) -> list[Reject]:
    """Decode rejects.

    Raises:
        ValueError: A line is no reject.
    """
    try:
        return [Reject(**json.loads(line)) for line in data.splitlines()]
    except TypeError as error:
        raise ValueError(f"no reject: {error}") from error
