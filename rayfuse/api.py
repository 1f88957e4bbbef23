"""The commands as functions: a recipe is opened once, and its run is planned, executed and read.

`rayfuse.cli` calls what is here. The results are the values that commands print with `--json`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.clean.command import clean_storage
from rayfuse.config.base import UserError
from rayfuse.config.load import change_values, read_file
from rayfuse.config.overrides import list_changes, parse_override, to_plain
from rayfuse.config.recipe import Recipe
from rayfuse.doctor.command import run_doctor
from rayfuse.interop.dataset import RowDataset, build_dataset
from rayfuse.interop.find import RunData
from rayfuse.interop.views import View
from rayfuse.merge.command import merge_recipe
from rayfuse.pipeline import STAGES, print_results, run_recipe
from rayfuse.plan.command import plan_recipe
from rayfuse.publish.command import push_model
from rayfuse.run.budget import Limits
from rayfuse.run.failed_sources import drop_sources, plan_run
from rayfuse.runtime.connect import describe_error, find_root_cause
from rayfuse.runtime.console import PlainConsole, open_console
from rayfuse.runtime.environment import open_private_folder, prepare_environment
from rayfuse.runtime.native_log import NATIVE_LOG
from rayfuse.runtime.notebook import CellInterrupted, is_notebook
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
    """Where all methods print; without it only `execute`, `merge`, `verify` and `watch` print: to
    stderr, in a notebook to the cell."""

    def __repr__(self) -> str:
        sources = ", ".join(source.name for source in self.recipe.sources)
        what = f"{sources} -> {self.recipe.target.model}, in {self.recipe.storage}"
        return f"<Run of {self.file or 'a recipe'}: {what}>"

    def execute(
        self,
        stages: str | Sequence[str] | None = None,
        *,
        quiet: bool = False,
        max_hours: float | None = None,
        max_dollars: float | None = None,
    ) -> dict[str, Any]:
        """Run stages: complete ones are skipped, incomplete ones resume.

        Args:
            stages: A stage or several, in any order: `corpus`, `capture`, `align`, `train`,
                `evaluate`, `report`; all of them by default.
            quiet: Print no progress.
            max_hours: Stop after these hours of this call, between shards of capture or at a
                checkpoint of training. The process should then end: it may still hold nodes.
            max_dollars: Stop likewise once this call's workers have cost as much.

        Returns:
            What `rayfuse run --json` prints: which stages are complete, rows and tokens, scores;
            or, at a limit, `stopped` with the cost and what is left.

        Raises:
            UserError: A stage is unknown or its input is missing, a limit is not above 0 or has no
                price, or the recipe, a model, the documents or the storage cannot be used.
            ShardError: A shard that is read is missing or corrupt.
        """
        chosen = _order_stages(stages)
        limits = Limits(max_hours, max_dollars)
        console = self._console(quiet)
        with _work_on_ray():
            return run_recipe(self.recipe, chosen, console, file=self.file, limits=limits)

    def merge(self, *, quiet: bool = False) -> dict[str, Any]:
        """Fuse the target with each source alone, merge the results, and choose the best model.

        Rows must be captured and aligned; the sources are not run again. What is complete is
        skipped.

        Args:
            quiet: Print no progress.

        Returns:
            What `rayfuse merge --json` prints: the chosen model with its folder, and the bits per
            byte of each model on both halves of the held-out documents.

        Raises:
            UserError: There are fewer than two sources, rows are missing, a setting of the section
                `merge` does not fit, or the models cannot be merged.
            ShardError: A shard or a file that is read is missing or corrupt.
        """
        console = self._console(quiet)
        with _work_on_ray():
            return merge_recipe(self.recipe, console, file=self.file)

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
        with _work_on_ray():
            return verify_recipe(self.recipe, self._console(quiet), repair=repair, file=self.file)

    def push(
        self, repository: str, *, upload: bool = False, public: bool = False, gguf: bool = False
    ) -> dict[str, Any]:
        """List what is published of the fused model: files, bytes and card; upload it if wanted.

        Args:
            repository: The model's name on the hub, USER/NAME.
            upload: Upload it, with the token of HF_TOKEN; else nothing is sent.
            public: The repository is public; else it is private.
            gguf: Publish a GGUF file, too, which llama.cpp's `convert_hf_to_gguf.py` writes.

        Raises:
            UserError: The name is not valid, the model is not trained and evaluated, there is no
                token or no right, the hub is unavailable, or the converter is missing or fails.
            ShardError: A record or a file of the model is corrupt.
        """
        console = self._console(quiet=True)
        return push_model(self.recipe, repository, console, upload=upload, public=public, gguf=gguf)

    def results(self) -> dict[str, Any]:
        """Read the results that are there: rows and tokens, bits per byte by model, task scores.

        Raises:
            UserError: The recipe cannot be used, or the storage has another schema version.
            ShardError: A record is corrupt.
        """
        layout = plan_run(self.recipe, ALIGN_FACTS)
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
        layout = plan_run(self.recipe, ALIGN_FACTS)
        recipe = drop_sources(self.recipe, layout.failed)
        run = RunData(recipe, layout.corpus, layout.captured, layout.aligned)
        return build_dataset(run, view, source)

    def _console(self, quiet: bool) -> Console:
        if self.console is not None:
            return self.console
        return PlainConsole(None, quiet=True) if quiet else open_console(to_stderr=True)


@contextmanager
def _work_on_ray() -> Iterator[None]:
    """Raise a worker's `UserError` itself; in a notebook, keep what is no result out of the cell.

    Raises:
        UserError: A worker has raised one, inside an error of Ray.
        CellInterrupted: The kernel of a notebook was interrupted.
    """
    try:
        with NATIVE_LOG.redirect(open_private_folder()) if is_notebook() else nullcontext():
            yield
    except KeyboardInterrupt:
        if not is_notebook():
            raise
        text = "interrupted; everything that is committed is kept: to resume, run the cell again"
        raise CellInterrupted(text) from None
    except Exception as error:
        cause = find_root_cause(error)
        if isinstance(cause, UserError) and cause is not error:
            raise UserError(describe_error(cause)) from None
        raise


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


def load_run_with(
    recipe: "str | os.PathLike[str]", overrides: Sequence[str], console: Console | None = None
) -> Run:
    """Open the run of a recipe file with `section.key=value` overrides, as `load_run` does.

    Raises:
        UserError: As for `open_run`.
    """
    return load_run(recipe, [parse_override(override) for override in overrides], console)


def clean_runs(
    arguments: Sequence[str], console: Console, *, delete: bool, idle_hours: float
) -> dict[str, Any]:
    """List, and with `delete` remove, what no recipe uses in the storage that the recipes share.

    Args:
        arguments: Recipe files; each may be followed by `section.key=value` overrides.
        console: Where the list is printed.
        delete: As for `clean_storage`, and so is `idle_hours`.
        idle_hours: Of an incomplete data set that no job is at work on.

    Raises:
        UserError: As for `clean_storage`, or an override has no recipe before it.
    """
    given: list[tuple[str, list[str]]] = []
    for argument in arguments:
        is_override = "=" in argument and not os.path.exists(argument)
        if not is_override:
            given.append((argument, []))
        elif given:
            given[-1][1].append(argument)
        else:
            raise UserError(f"{argument} is an override without a recipe before it; give one")
    recipes = [load_run_with(file, overrides).recipe for file, overrides in given]
    return clean_storage(recipes, console, delete=delete, idle_hours=idle_hours)


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
