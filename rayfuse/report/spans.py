"""When each worker captured each shard, from the commit records."""

from dataclasses import dataclass

from rayfuse.storage.dataset import DataSet


@dataclass(frozen=True)
class ShardSpan:
    """The time that one worker took for one shard."""

    worker: str
    began: float
    """When the device started on it: Unix time in seconds, by the worker's clock."""
    busy_seconds: float
    idle_seconds: float
    """How long the device had waited before."""
    tokens: int

    @property
    def ended(self) -> float:
        """When the device finished it: Unix time in seconds."""
        return self.began + self.busy_seconds


def read_spans(captured: DataSet) -> list[ShardSpan]:
    """Read which worker captured which shard when, in order of time."""
    spans = [
        ShardSpan(
            commit.worker,
            commit.stats["began"],
            commit.stats["busy_seconds"],
            commit.stats["idle_seconds"],
            commit.tokens,
        )
        for commit in captured.commits().values()
        if "began" in commit.stats
    ]
    return sorted(spans, key=lambda span: (span.began, span.worker))


def sum_busy(spans: list[ShardSpan]) -> float:
    """Sum the seconds in which devices computed; never 0, so that it can divide."""
    return max(sum(span.busy_seconds for span in spans), 1e-9)


def share_waited(spans: list[ShardSpan]) -> float:
    """Compute the share of the workers' time in which their devices were idle."""
    waited = sum(span.idle_seconds for span in spans)
    return waited / (waited + sum_busy(spans))
