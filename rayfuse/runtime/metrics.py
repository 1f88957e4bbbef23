"""Count each stage's rows, tokens and seconds of work in Ray's metrics.

The capture stage has its own counters, `rayfuse_capture_*`, which also show idle GPUs.
cluster/grafana.json shows all of them.
"""

from functools import cache
from typing import Any

TAGS = ("stage", "name")


def count_work(stage: str, name: str, *, tokens: int, seconds: float, rows: int = 0) -> None:
    """Add the work of this process to the counters of a stage.

    Args:
        stage: corpus, align, train or evaluate.
        name: Of the data set, source, run or model that was worked on.
        tokens: Target tokens done; in evaluate, tokens of the evaluated model.
        seconds: Time that this process took.
        rows: Rows done, if they are counted.
    """
    for counter, amount in zip(_build_counters(), (rows, tokens, seconds), strict=True):
        if amount > 0:  # Ray rejects an increment of 0
            counter.inc(amount, {"stage": stage, "name": name})


@cache
def _build_counters() -> tuple[Any, Any, Any]:
    from ray.util.metrics import Counter  # late: `rayfuse inspect` aligns without Ray

    return (
        Counter("rayfuse_rows", "Rows done", TAGS),
        Counter("rayfuse_tokens", "Tokens done", TAGS),
        Counter("rayfuse_seconds", "Seconds of work, of all processes", TAGS),
    )
