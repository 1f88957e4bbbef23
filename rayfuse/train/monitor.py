"""What training workers report, and what the driver reads of it."""

from dataclasses import dataclass, field


@dataclass
class RunState:
    """What is known of something that runs."""

    step: int = 0
    num_steps: int = 0
    note: str = ""
    told: list[str] = field(default_factory=list[str])
    validations: dict[int, float] = field(default_factory=dict[int, float])
    """Bits per byte by step."""
    fault: Exception | None = None
    max_sequences: int | None = None
    """Of a micro-batch, where more did not fit the memory."""


class RunStatus:
    """An actor where workers write how far they are, and the driver reads it."""

    def __init__(self) -> None:
        self.runs: dict[str, RunState] = {}

    def begin(self, name: str) -> None:
        """Take note that something has a machine, and no step yet."""
        self.runs.setdefault(name, RunState())

    def write(self, name: str, step: int, num_steps: int, note: str = "") -> None:
        """Take note of a step of something that runs."""
        run = self.runs.setdefault(name, RunState())
        run.step, run.num_steps, run.note = step, num_steps, note

    def tell(self, name: str, text: str) -> None:
        """Take note of something that is to be said once."""
        self.runs.setdefault(name, RunState()).told.append(text)

    def validate(self, name: str, step: int, bits_per_byte: float) -> None:
        """Take note of a validation."""
        self.runs.setdefault(name, RunState()).validations[step] = bits_per_byte

    def limit(self, name: str, max_sequences: int) -> None:
        """Take note of how many sequences a micro-batch may have after memory ran out."""
        self.runs.setdefault(name, RunState()).max_sequences = max_sequences

    def fail(self, name: str, fault: Exception) -> None:
        """Take note of what trying again would not mend."""
        self.runs.setdefault(name, RunState()).fault = fault

    def read(self) -> dict[str, RunState]:
        """Return the state of all that runs."""
        return self.runs
