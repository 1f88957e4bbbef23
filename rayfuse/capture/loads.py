"""How often loading a source LLM has ended in the death of its actor's process."""

from collections import Counter


class Loads:
    """Keeps count for all sources. Ray restarts an actor without end and tells nobody."""

    def __init__(self) -> None:
        self.loading: set[str] = set()
        self.deaths: Counter[str] = Counter()

    def begin(self, source: str, actor: str) -> int:
        """Note that an actor starts to load, and return the deaths since one of its source's had.

        Args:
            source: The source's name.
            actor: Its id, the same after a restart.
        """
        if actor in self.loading:
            self.deaths[source] += 1
        self.loading.add(actor)
        return self.deaths[source]

    def end(self, source: str, actor: str) -> None:
        """Note that an actor has its model."""
        self.loading.discard(actor)
        self.deaths[source] = 0
