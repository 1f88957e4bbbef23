"""The commands as functions: a recipe is opened once, and its run is planned, executed and read.

`rayfuse.cli` calls what is here. The results are the values that commands print with `--json`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.base import UserError
from rayfuse.config.load import change_values, read_file
from rayfuse.config.overrides import list_changes, to_plain
from rayfuse.config.recipe import Recipe
from rayfuse.doctor.command import run_doctor
from rayfuse.interop.dataset import RowDataset, build_dataset
from rayfuse.interop.find import RunData
from rayfuse.interop.views import View
from rayfuse.pipeline import STAGES, print_results, run_recipe
from rayfuse.plan.command import plan_recipe
from rayfuse.run.layout import plan_layout
from rayfuse.runtime.console import PlainConsole, open_console
from rayfuse.runtime.environment import prepare_environment
from rayfuse.status import show_status, verify_recipe
from rayfuse.watch.command import watch_recipe


@dataclass(frozen=True)
class Run:
    """A recipe, and what is stored of its run. Made by `rayfuse.open_run`."""

    recipe: Recipe
    """The resolved recipe."""
    file: str | None = None
    """The recipe's file, for hints; None if it was given as values."""
    console: Console | None = field(default=None, repr=False)
    """Where all methods print; without it only `execute` and `verify` print, to stderr."""

    def execute(
        self, stages: str | Sequence[str] | None = None, *, quiet: bool = False
    ) -> dict[str, Any]:
        """Run stages: complete ones are skipped, incomplete ones resume.

        Args:
            stages: A stage or several, in any order: `corpus`, `capture`, `align`, `train`,
                `evaluate`, `report`; all of them by default.
            quiet: Print no progress.

        Returns:
            What `rayfuse run --json` prints: which stages are complete, rows and tokens, scores.

        Raises:
            UserError: A stage is unknown or its input is missing, or the recipe, a model, the
                documents or the storage cannot be used.
            ShardError: A shard that is read is missing or corrupt.
        """
        chosen = _order_stages(stages)
        return run_recipe(self.recipe, chosen, self._console(quiet), file=self.file)

    def plan(self, *, probe: bool = False) -> dict[str, Any]:
        """Estimate tokens, bytes, requests, GPU-hours and dollars; starts nothing.

        Args:
            probe: Measure models and storage, in a minute at most.

        Raises:
            UserError: A size is unknown, or there is nothing to probe.
        """
        return plan_recipe(self.recipe, self._console(quiet=True), probe=probe)

    def doctor(self) -> dict[str, Any]:
        """Check the recipe and the cluster of RAY_ADDRESS, and return the findings."""
        return run_doctor(self.recipe, self._console(quiet=True))

    def status(self) -> dict[str, Any]:
        """Count what is complete, missing and rejected; needs no cluster.

        Raises:
            UserError: The recipe cannot be used, or the storage has another schema version.
            ShardError: A record is corrupt.
        """
        return show_status(self.recipe, self._console(quiet=True))

    def watch(self, *, port: int = 0, open_browser: bool = True) -> None:
        """Serve a local page of the run's progress until the process is interrupted.

        Args:
            port: The page's port on the loopback interface; 0 for any free one.
            open_browser: Open the page in a browser, where there is a desktop.

        Raises:
            UserError: The recipe or the port cannot be used, or the storage has another schema
                version.
        """
        watch_recipe(self.recipe, self._console(quiet=False), port=port, open_browser=open_browser)

    def verify(self, *, repair: bool = False, quiet: bool = False) -> dict[str, Any]:
        """Read and check every shard, and return the corrupt ones by data set.

        Args:
            repair: Remove leftovers, and write corrupt shards again, which needs a cluster.
            quiet: Print no progress.

        Raises:
            UserError: The recipe cannot be used, or the storage has another schema version.
        """
        return verify_recipe(self.recipe, self._console(quiet), repair=repair, file=self.file)

    def results(self) -> dict[str, Any]:
        """Read the results that are there: rows and tokens, bits per byte by model, task scores.

        Raises:
            UserError: The recipe cannot be used, or the storage has another schema version.
            ShardError: A record is corrupt.
        """
        layout = plan_layout(self.recipe, ALIGN_FACTS)
        return print_results(layout, STAGES, self._console(quiet=True))

    def open_dataset(self, view: View = "fused", *, source: str | None = None) -> RowDataset:
        """Open the run's rows as `rayfuse.open_dataset` does; they are found by the recipe.

        Args:
            view: `captured`, `aligned` or `fused`.
            source: The source, for the views of one source, where there are several.

        Raises:
            UserError: There is no such view or source, or rows are incomplete.
            ShardError: A record is corrupt.
        """
        layout = plan_layout(self.recipe, ALIGN_FACTS)
        run = RunData(self.recipe, layout.corpus, layout.captured, layout.aligned)
        return build_dataset(run, view, source)

    def _console(self, quiet: bool) -> Console:
        if self.console is not None:
            return self.console
        return PlainConsole(None, quiet=True) if quiet else open_console(to_stderr=True)


def open_run(
    recipe: "str | os.PathLike[str] | Mapping[str, Any] | Recipe", /, **changes: Any
) -> Run:
    """Open a recipe's run; nothing is started, and no model is loaded.

    Args:
        recipe: A recipe file (YAML), its values as a dictionary, or a `Recipe`.
        changes: Settings that replace the recipe's. A section's name takes a dictionary of the
            settings to change, `train={"learning_rate": 1e-4}`; a dotted key sets its value, as on
            the command line, `**{"train.learning_rate": 1e-4}`.

    Raises:
        UserError: The file cannot be read, or a setting is unknown or wrong; every fault is listed,
            with the setting, its value and the remedy.
    """
    return load_run(recipe, list_changes(changes))


def load_run(
    recipe: "str | os.PathLike[str] | Mapping[str, Any] | Recipe",
    changes: Sequence[tuple[str, Any]],
    console: Console | None = None,
) -> Run:
    """Open a recipe's run as `open_run` does.

    Args:
        recipe: As for `open_run`.
        changes: Dotted keys with the values that they get, in order.
        console: Where all methods of the run print.

    Raises:
        UserError: As for `open_run`.
    """
    prepare_environment()
    if isinstance(recipe, Recipe):
        values, file = recipe.model_dump(mode="json", by_alias=True), None
    elif isinstance(recipe, Mapping):
        values, file = to_plain(recipe), None
    else:
        file = os.fspath(recipe)
        values = read_file(file)
    return Run(change_values(values, changes), file, console)


def _order_stages(stages: str | Sequence[str] | None) -> tuple[str, ...]:
    """Put stages into the order in which they run.

    Raises:
        UserError: One is unknown, or there is none.
    """
    chosen = STAGES if stages is None else (stages,) if isinstance(stages, str) else tuple(stages)
    unknown = [stage for stage in chosen if stage not in STAGES]
    if unknown or not chosen:
        given = repr(unknown[0]) if unknown else "empty"
        raise UserError(f"stages is {given}; the stages are {', '.join(STAGES)}")
    return tuple(stage for stage in STAGES if stage in chosen)
