"""What training runs report to the driver, and what decides about a run's next attempt.

Two actors: `RunStatus` is shown to the user and nothing else; `RunControl` is obeyed. Both live
outside the workers, so that they survive an attempt that fails.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.runtime.resources import REPORT_WAIT_SECONDS


@dataclass
class RunState:
    """The progress of one run."""

    step: int = 0
    num_steps: int = 0
    note: str = ""
    messages: list[str] = field(default_factory=list[str])
    """Each is shown once."""
    validations: dict[int, float] = field(default_factory=dict[int, float])
    """Bits per byte by step."""
    worker_seconds: float = 0.0
    """Of all workers and attempts, from the start of a worker to its last step."""


class RunStatus:
    """An actor to which workers report progress; the driver reads and shows it."""

    def __init__(self) -> None:
        self.runs: dict[str, RunState] = {}

    def start(self, name: str) -> None:
        """Record that a run has workers."""
        self.runs.setdefault(name, RunState())

    def record_step(
        self, name: str, step: int, num_steps: int, note: str = "", worker_seconds: float = 0.0
    ) -> None:
        """Record the last finished step of a run, and the time of all workers since the one before.

        Args:
            name: The run's.
            step: The number of the step.
            num_steps: Steps of the entire run.
            note: What is shown beside it.
            worker_seconds: Since the step before, or since the start of the workers.
        """
        run = self.runs.setdefault(name, RunState())
        run.step, run.num_steps, run.note = step, num_steps, note
        run.worker_seconds += worker_seconds

    def log(self, name: str, message: str) -> None:
        """Add a message that the driver shows once."""
        self.runs.setdefault(name, RunState()).messages.append(message)

    def record_validation(self, name: str, step: int, bits_per_byte: float) -> None:
        """Record the held-out bits per byte after a step."""
        self.runs.setdefault(name, RunState()).validations[step] = bits_per_byte

    def read(self) -> dict[str, RunState]:
        """Return the state of every run that has started, by name."""
        return self.runs


class RunControl:
    """An actor through which a failed attempt decides whether and how its run is retried, and the
    driver stops all runs."""

    def __init__(self) -> None:
        self.is_stopping = False
        self.max_sequences: dict[str, int] = {}
        self.errors: dict[str, Exception] = {}

    def request_stop(self) -> None:
        """Let all runs stop at a checkpoint after their current step."""
        self.is_stopping = True

    def has_stopped(self) -> bool:
        """Check whether all runs are to stop."""
        return self.is_stopping

    def set_max_sequences(self, name: str, max_sequences: int) -> None:
        """Limit the sequences of a micro-batch in the next attempts of a run."""
        self.max_sequences[name] = max_sequences

    def read_max_sequences(self, name: str) -> int | None:
        """Return the limit of a run; None until one was set."""
        return self.max_sequences.get(name)

    def set_error(self, name: str, error: Exception) -> None:
        """Record a non-retryable error of a run: the driver raises it and cancels all runs."""
        self.errors[name] = error

    def read_errors(self) -> list[Exception]:
        """Return the non-retryable errors of all runs."""
        return [*self.errors.values()]


class RunMonitor:
    """Reports what is new in the states of the runs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.num_reported: dict[str, int] = {}
        self.waiting: set[str] = set()
        self.has_warned = False
        self.expected: dict[str, tuple[float, str]] = {}

    def expect(self, needs: Mapping[str, str]) -> None:
        """Start the clock of runs that request their workers now.

        Args:
            needs: The resources of all workers of a run as text, by the run's name.
        """
        deadline = time.monotonic() + REPORT_WAIT_SECONDS
        self.expected |= {name: (deadline, text) for name, text in needs.items()}

    def report(self, states: Mapping[str, RunState]) -> None:
        """Report each run's step and new messages, and warn if fusion is worse than CLM."""
        self._report_missing(states)
        for name, state in states.items():
            for message in state.messages[self.num_reported.get(name, 0) :]:
                self._notify(name, message)
            self.num_reported[name] = len(state.messages)
            if state.num_steps:
                done = state.step, state.num_steps
                self.progress(
                    ProgressEvent("train", name, *done, "steps", state.note, state.worker_seconds)
                )
        if {"fused", "clm"} <= set(states):
            self._compare(states["fused"], states["clm"])

    def report_waiting(self, name: str, holder: str) -> None:
        """Report, once, that another job holds the lease of a run."""
        if name not in self.waiting:
            self.waiting.add(name)
            note = (
                f"{holder} trains this run already; this job waits, and takes over if that "
                "process dies"
            )
            self._notify(name, note)

    def _report_missing(self, states: Mapping[str, RunState]) -> None:
        """Report the needs of runs that have had no workers for `REPORT_WAIT_SECONDS`."""
        for name, (deadline, needs) in [*self.expected.items()]:
            if name in states:
                del self.expected[name]
            elif time.monotonic() > deadline:
                del self.expected[name]
                self._notify(name, f"no worker has started yet; nodes need {needs}")

    def _notify(self, name: str, note: str) -> None:
        self.progress(ProgressEvent("train", name, note=note))

    def _compare(self, fused: RunState, clm: RunState) -> None:
        """Warn once if fusion is worse than the same training without it."""
        common = sorted(set(fused.validations) & set(clm.validations))
        if self.has_warned or not common:
            return
        step = common[-1]
        if fused.validations[step] > clm.validations[step]:
            self.has_warned = True
            note = (
                f"warning: at step {step} fusion is worse on held-out rows, "
                f"{fused.validations[step]:.4f} bits per byte against "
                f"{clm.validations[step]:.4f} without it; compare the sources' own scores, or "
                "raise train.lambda"
            )
            self._notify("fused", note)
