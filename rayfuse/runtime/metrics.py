"""What stages tell Ray's metrics: rows and tokens done, and the seconds of work that they took.

Capture, which has devices that must not wait, tells more: `rayfuse_capture_*`. cluster/grafana.json
shows all of it.
"""

from functools import cache
from typing import Any

TAGS = ("stage", "name")


def count_work(stage: str, name: str, *, tokens: int, seconds: float, rows: int = 0) -> None:
    """Add what this process has done to the counters of a stage.

    Args:
        stage: corpus, align, train or evaluate.
        name: Of what was worked on: a data set, a source, a run, a model.
        tokens: That were done, of the target; in evaluate, the model's own.
        seconds: That this process took for them.
        rows: That were done, where they are counted.
    """
    for counter, amount in zip(_build_counters(), (rows, tokens, seconds), strict=True):
        if amount > 0:  # Ray refuses to count none
            counter.inc(amount, {"stage": stage, "name": name})


@cache
def _build_counters() -> tuple[Any, Any, Any]:
    from ray.util.metrics import Counter  # here: `rayfuse inspect` aligns without Ray

    return (
        Counter("rayfuse_rows", "Rows done", TAGS),
        Counter("rayfuse_tokens", "Tokens done", TAGS),
        Counter("rayfuse_seconds", "Seconds of work, of all processes", TAGS),
    )
