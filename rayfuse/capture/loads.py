"""How often loading a source LLM has ended in the death of its actor's process."""


class Loads:
    """Keeps count for one source. Ray restarts an actor without end and tells nobody."""

    def __init__(self) -> None:
        self.loading: set[str] = set()
        self.deaths = 0

    def begin(self, actor: str) -> int:
        """Note that an actor starts to load, and return the deaths since anyone was done.

        Args:
            actor: Its id, the same after a restart.
        """
        if actor in self.loading:
            self.deaths += 1
        self.loading.add(actor)
        return self.deaths

    def end(self, actor: str) -> None:
        """Note that an actor has its model."""
        self.loading.discard(actor)
        self.deaths = 0
