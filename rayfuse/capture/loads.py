"""How often loading a source LLM has ended in the death of its actor's process."""

from collections import Counter


class Loads:
    """Keeps count for all actors. Ray restarts an actor without end and tells nobody."""

    def __init__(self) -> None:
        self.loading: set[str] = set()
        self.deaths: Counter[str] = Counter()

    def begin(self, actor: str) -> int:
        """Note that an actor starts to load, and return its deaths in a row in the middle of that.

        A machine that is lost takes all its actors at once: each has a count of its own.

        Args:
            actor: Its id, the same after a restart.
        """
        if actor in self.loading:
            self.deaths[actor] += 1
        self.loading.add(actor)
        return self.deaths[actor]

    def end(self, actor: str) -> None:
        """Note that an actor has its model."""
        self.loading.discard(actor)
        self.deaths[actor] = 0
