"""The `rayfuse` command: each sub-command parses its arguments, calls one function, and prints.

The modules of rayfuse are imported inside the commands: torch, ray and pydantic take seconds to
import, and `rayfuse --help` needs none of them.
"""

import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

import rayfuse
from rayfuse.runtime.command import (
    FAILED,
    STOPPED,
    USER_ERROR,
    CommandOutput,
    Interrupt,
    command_output,
    exit_interrupted,
    interrupt,
    is_interrupt,
    print_error,
    shut_down,
)
from rayfuse.runtime.command_group import MAX_WIDTH, CommandGroup
from rayfuse.runtime.native_log import NATIVE_LOG

if TYPE_CHECKING:
    from rayfuse.api import Run

app = typer.Typer(
    name="rayfuse",
    help="Fuse several LLMs into one, on a Ray cluster.",
    cls=CommandGroup,
    context_settings={"max_content_width": MAX_WIDTH},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, overriding the recipe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout at the end.")]


def main() -> NoReturn:
    """Run the command, print an error as one message on stderr, and end the process.

    Python's own shutdown would end a thread of a compiled library in the middle, which now and then
    aborts the process with exit code 134 after all is done.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    try:
        code = _run_command()
        atexit._run_exitfuncs()  # Ray's among them
    except Interrupt:
        exit_interrupted()
    NATIVE_LOG.report()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of a pipe has gone
            stream.flush()
    os._exit(code)


def _run_command() -> int:
    """Run the command, and return its exit code."""
    try:
        app()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED if stop.code else 0
    except Interrupt:
        exit_interrupted()
    except Exception as error:  # the last place that can turn an error into a message
        from rayfuse.config.base import UserError
        from rayfuse.runtime.connect import describe_error, find_root_cause

        if is_interrupt(error):
            exit_interrupted()
        cause = find_root_cause(error)
        if isinstance(cause, UserError):
            return print_error(describe_error(cause), USER_ERROR)
        return print_error(f"{type(cause).__name__}: {describe_error(cause)}", FAILED)
    return 0


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    max_hours: Annotated[
        float | None,
        typer.Option(help="Stop after these hours of this command; earlier ones do not count."),
    ] = None,
    max_dollars: Annotated[
        float | None,
        typer.Option(
            help="Stop once this command's workers have cost this, at sources[].dollars_per_hour "
            "or the on-demand prices of plan.gpus; earlier commands do not count."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run all stages: skip complete ones, resume incomplete ones.

    At a limit it stops between shards or at a checkpoint, with exit code 3; to resume, run it
    again.
    """
    with command_output(as_json, starts_ray=True) as output:
        opened = _load_run(recipe, overrides, output)
        output.values |= opened.execute(max_hours=max_hours, max_dollars=max_dollars)
    if "stopped" in output.values:
        shut_down()
        sys.exit(STOPPED)


@app.command()
def corpus(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Split documents into rows that fit every tokenizer."""
    _run_stages(recipe, overrides, "corpus", as_json)


@app.command()
def capture(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run every source LLM over the corpus. Each shard is aligned as soon as it is captured."""
    _run_stages(recipe, overrides, "capture", as_json)


@app.command()
def align(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Align captured shards with the target's tokens; needs no GPU."""
    _run_stages(recipe, overrides, "align", as_json)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train the target on the fused rows. Also on the same rows without fusion, as the baseline."""
    _run_stages(recipe, overrides, "train", as_json)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Score every model on held-out text, in bits per byte."""
    _run_stages(recipe, overrides, "evaluate", as_json)


@app.command()
def report(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write tables and plots of a complete run."""
    _run_stages(recipe, overrides, "report", as_json)


@app.command()
def merge(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Fuse the target with each source alone, and merge the results. The best is chosen.

    It starts from captured and aligned rows; what is complete is skipped.
    """
    with command_output(as_json, starts_ray=True) as output:
        output.values |= _load_run(recipe, overrides, output).merge()


def _run_stages(
    recipe: Path, overrides: list[str] | None, stage: str | None, as_json: bool
) -> None:
    """Run one stage, or all if it is None."""
    with command_output(as_json, starts_ray=True) as output:
        output.values |= _load_run(recipe, overrides, output).execute(stage)


def _load_run(recipe: str | Path, overrides: list[str] | None, output: CommandOutput) -> "Run":
    """Open the run of a recipe file, which prints to the command's output."""
    from rayfuse import api

    return api.load_run_with(recipe, overrides or [], output.console)


@app.command()
def status(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what is complete, missing and rejected; needs no cluster."""
    with command_output(as_json) as output:
        output.values |= _load_run(recipe, overrides, output).status()


@app.command()
def watch(
    recipe: RecipePath,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="Port on this computer; 0 for any free one.")] = 0,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Only print the page's address.")
    ] = False,
) -> None:
    """Show a run's progress on a local web page. It updates by itself; needs no cluster."""
    with command_output(as_json=False) as output, suppress(Interrupt):
        run = _load_run(recipe, overrides, output)
        run.watch(port=port, open_browser=not no_browser)


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file (YAML).")] = None,
    overrides: Overrides = None,
    example: Annotated[
        str | None, typer.Option(help="Instead of a recipe: `fusellm`, the paper's own set-up.")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Target tokens of the corpus, such as 1e12.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure models and storage, in a minute at most.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate bytes, GPU-hours and dollars. Nothing is started, and no GPU requested."""
    with command_output(as_json) as output:
        given = [] if tokens is None else [f"plan.tokens={tokens!r}"]
        if recipe is not None and example is None:
            settings = [*(overrides or []), *given]
            output.values |= _load_run(recipe, settings, output).plan(probe=probe)
            return
        from rayfuse.plan.command import plan_example

        # Without a recipe the first argument is an override.
        settings = [*([recipe] if recipe else []), *(overrides or []), *given]
        output.values |= plan_example(example, settings, output.console, probe=probe)


@app.command()
def doctor(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe and the cluster of RAY_ADDRESS before a run. Exit code 1 if errors."""
    with command_output(as_json) as output:
        output.values |= _load_run(recipe, overrides, output).doctor()
    if any(finding["severity"] == "error" for finding in output.values["findings"]):
        sys.exit(FAILED)


@app.command()
def verify(
    recipe: RecipePath,
    overrides: Overrides = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove leftovers; write corrupt shards again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read and check every shard; only --repair needs a cluster. Exit code 1 if any is corrupt."""
    with command_output(as_json, starts_ray=repair) as output:
        output.values |= _load_run(recipe, overrides, output).verify(repair=repair)
    is_corrupt = any(values["corrupt"] for values in output.values["data_sets"].values())
    if is_corrupt and not repair:
        remedy = f"rayfuse verify {recipe} --repair"
        sys.exit(print_error(f"shards are corrupt; to fix them: {remedy}", FAILED))


@app.command("import")
def import_(
    store: Annotated[str, typer.Argument(help="A folder that DistillKit or FuseLLM wrote.")],
    documents: Annotated[str, typer.Argument(help="The file of texts to write: NAME.jsonl.")],
    model: Annotated[str, typer.Option(help="The model that the store is of: its tokenizer.")],
    revision: Annotated[str | None, typer.Option(help="The model's hub commit.")] = None,
    aligned: Annotated[
        int | None, typer.Option(help="Of FuseLLM's alignment stage, the number of the source.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read another tool's store. Writes its texts as documents, and prints the settings."""
    with command_output(as_json) as output:
        output.values |= rayfuse.import_store(
            store, documents, model, revision=revision, aligned=aligned, console=output.console
        )


@app.command()
def push(
    recipe: RecipePath,
    repository: Annotated[str, typer.Argument(help="The model's name on the hub: USER/NAME.")],
    overrides: Overrides = None,
    *,
    upload: Annotated[bool, typer.Option("--upload", help="Upload it; else list it.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Make it public; else it is private.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Add a GGUF file, by llama.cpp's converter.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish the fused model on a hub. Without --upload: files, bytes and the model card."""
    with command_output(as_json) as output:
        values = _load_run(recipe, overrides, output).push(
            repository, upload=upload, public=public, gguf=gguf
        )
        output.values |= values


@app.command()
def clean(
    recipes: Annotated[
        list[str],
        typer.Argument(help="All recipes of one storage; an override changes the one before."),
    ],
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is marked unused.")] = False,
    idle_hours: Annotated[
        float,
        typer.Option(help="Incomplete data written more recently may belong to a running job."),
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """List what no recipe uses, with bytes and cost. --delete removes it; needs no cluster."""
    with command_output(as_json) as output:
        from rayfuse import api

        output.values |= api.clean_runs(
            recipes, output.console, delete=delete, idle_hours=idle_hours
        )


@app.command()
def migrate(
    storage: Annotated[str, typer.Argument(help="A run's storage: a folder or a URI.")],
    as_json: AsJson = False,
) -> None:
    """Migrate storage of an earlier version. Run it again to resume; needs no GPU."""
    with command_output(as_json) as output:
        from rayfuse.status import migrate_storage

        output.values |= migrate_storage(storage, output.console)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A tokenizer (folder or hub id), or a recipe.")],
    target: Annotated[
        str | None, typer.Argument(help="A tokenizer; with a recipe, the name of one source.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file to tokenize.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a picture of the alignment.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how two tokenizers align. Coverage, lost mass, and the worst tokens."""
    with command_output(as_json) as output:
        from rayfuse.inspect.command import inspect_pairs, is_recipe, print_report

        results = inspect_pairs(source, target, text, html)
        output.values |= {"pairs": results} if is_recipe(source) else results[0]
        if as_json:
            return
        for numbers in results:
            print_report(numbers, output.console)
        if html:
            output.console.print(f"picture: {html}")


@app.command()
def init(
    target: Annotated[str | None, typer.Option(help="The model to train.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="A model to learn from; repeat.")] = None,
) -> None:
    """Print a commented recipe to start from. It has what the models' files state of them."""
    print(rayfuse.write_recipe(target, source or ()), end="")


@app.command()
def demo(
    storage: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="Seed of the text and the training.")] = 0,
    train_models: Annotated[
        bool, typer.Option("--train-models", help="Train the tiny models from scratch, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a complete fusion of tiny models on this machine, offline."""
    began = time.monotonic()
    with command_output(as_json, starts_ray=True) as output:
        from rayfuse.demo.command import create_demo

        recipe = create_demo(storage.absolute(), seed, output.console, train_models=train_models)
        output.values |= _load_run(recipe, None, output).execute()
        output.values["seconds"] = round(time.monotonic() - began, 1)
        output.console.print(
            f"the demo took {output.values['seconds']:.0f} s; its recipe: {recipe}"
        )
        output.console.print(f"to change and rerun it:  rayfuse run {recipe} train.lambda=0.9")
