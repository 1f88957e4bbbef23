"""How many actors each source may have, so that all sources finish together."""

from collections.abc import Sequence


def allocate_actors(work: Sequence[float], costs: Sequence[float], room: float) -> list[int]:
    """Return each source's number of actors: room is given to whoever would finish last.

    Args:
        work: What is left of each source, in any unit that grows with the time it takes.
        costs: GPUs (or CPUs) of one of its actors; above 0.
        room: GPUs (or CPUs) that there are.

    Returns:
        At least 1 each, even where there is no room: then they take turns.
    """
    counts = [1] * len(work)
    left = room - sum(costs)
    while True:
        fitting = [i for i, cost in enumerate(costs) if cost <= left + 1e-9 and work[i] > 0]
        if not fitting:
            return counts
        slowest = max(fitting, key=lambda i: (work[i] / counts[i], -i))
        counts[slowest] += 1
        left -= costs[slowest]
