"""How often an actor's process has died before it had finished a shard."""

from collections import Counter


class CrashCounter:
    """Keeps count for all actors. Ray restarts an actor without end and tells nobody."""

    def __init__(self) -> None:
        self.unproven: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.sources: set[str] = set()

    def begin(self, actor: str, source: str) -> int:
        """Note that an actor starts, and return its deaths in a row without a shard in between.

        A machine that is lost takes all its actors at once: each has a count of its own.

        Args:
            actor: Its id, the same after a restart.
            source: The name of its source.
        """
        self.sources.add(source)
        if actor in self.unproven:
            self.deaths[actor] += 1
        self.unproven.add(actor)
        return self.deaths[actor]

    def has_begun(self, source: str) -> bool:
        """Return whether any actor of a source has had a machine."""
        return source in self.sources

    def prove(self, actor: str) -> None:
        """Note that an actor has finished a shard."""
        self.unproven.discard(actor)
        self.deaths[actor] = 0
