"""A line of a plan, and what it costs on one kind of GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Requests:
    """Requests to object storage that grow with the run."""

    puts: float = 0.0
    gets: float = 0.0
    """HEAD included: it costs the same."""
    lists: float = 0.0

    def times(self, shards: int) -> "Requests":
        """Return those of so many shards."""
        return Requests(self.puts * shards, self.gets * shards, self.lists * shards)


@dataclass(frozen=True)
class GpuWork:
    """What a line of work asks of GPUs."""

    flops: float
    is_training: bool
    memory_bytes: float
    """Of one actor or worker."""
    gpus: float
    """Of one actor or worker."""
    actors: int
    accelerator_type: str | None
    """The kind that the recipe asks for."""
    needs_bfloat16: bool = True


@dataclass(frozen=True)
class Work:
    """A line of the plan: all of it, whatever is done already."""

    stage: str
    name: str
    tokens: float
    shards: int
    done: float
    """Share that is done."""
    stored_bytes: float
    requests: Requests
    core_hours: float = 0.0
    gpu: GpuWork | None = None

    @property
    def title(self) -> str:
        """What the line is called."""
        return f"{self.stage} {self.name}".strip()


@dataclass(frozen=True)
class GpuCost:
    """What is left of a line of work costs on one kind of GPU."""

    fits: bool
    hours: float
    """GPU-hours, on demand."""
    spot_dollars: float
    on_demand_dollars: float
