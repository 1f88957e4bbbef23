"""The `rayfuse` command: each sub-command calls stages. Imports are late, so that help is quick."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

app = typer.Typer(
    name="rayfuse",
    help="Fuse several LLMs into one, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, over the recipe's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]

BAD_INPUT, FAILED, STOPPED = 2, 1, 130


def main() -> None:
    """Run the command; user errors become one message and exit code 2, failures exit code 1."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        app()
    except StopRequest:
        _stop()
    except Exception as error:  # the last place that can turn a failure into a message
        from rayfuse.runtime.connect import find_root_cause

        if _comes_of_stop(error):
            _stop()
        cause = find_root_cause(error)
        if isinstance(cause, ValueError):
            _fail(str(cause), BAD_INPUT)
        _fail(f"{type(cause).__name__}: {cause}", FAILED)


class StopRequest(BaseException):
    """Somebody wants the command to end. No KeyboardInterrupt: typer has an answer of its own."""


def _interrupt(number: int, frame: object) -> None:
    raise StopRequest


def _comes_of_stop(error: BaseException | None) -> bool:
    """Return whether a request to stop became an error: in Ray's compiled code, a SystemError."""
    while error is not None and not isinstance(error, StopRequest):
        error = error.__cause__ or error.__context__
    return error is not None


def _stop() -> None:
    """End at once, whatever threads still do: all that counts is committed."""
    from rayfuse.runtime.connect import shutdown_now

    print("rayfuse: stopped; the same command goes on where it was", file=sys.stderr, flush=True)
    shutdown_now()
    sys.stdout.flush()
    os._exit(STOPPED)


def _fail(message: str, code: int) -> None:
    print(f"rayfuse: error: {message}", file=sys.stderr)
    sys.exit(code)


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run all stages; those that are done are skipped, broken ones go on where they stopped."""
    from rayfuse.pipeline import STAGES

    _run_recipe(recipe, overrides, STAGES, as_json)


@app.command()
def corpus(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Read documents and cut them into rows that fit every tokenizer."""
    _run_recipe(recipe, overrides, ("corpus",), as_json)


@app.command()
def capture(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run every source LLM over the corpus, and align what it says behind it."""
    _run_recipe(recipe, overrides, ("capture",), as_json)


@app.command()
def align(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Align captured shards with the target's tokens; needs no GPU."""
    _run_recipe(recipe, overrides, ("align",), as_json)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train the target on the fused rows, and without fusion for comparison."""
    _run_recipe(recipe, overrides, ("train",), as_json)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Score every model on held-out text, in bits per byte."""
    _run_recipe(recipe, overrides, ("evaluate",), as_json)


@app.command()
def report(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write tables and plots of a finished run."""
    _run_recipe(recipe, overrides, ("report",), as_json)


@app.command()
def status(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what is done, what is missing and what was rejected; needs no cluster."""
    stdout = _claim_stdout() if as_json else sys.stdout
    from rayfuse.config.load import read_recipe
    from rayfuse.pipeline import STAGES, is_stage_done
    from rayfuse.run.layout import plan_layout
    from rayfuse.runtime.console import open_console
    from rayfuse.status import list_numbers, print_status, read_statuses

    layout = plan_layout(read_recipe(recipe, overrides))
    statuses = read_statuses(layout)
    print_status(layout, statuses, open_console(to_stderr=as_json))
    if as_json:
        stages = {stage: is_stage_done(stage, layout) for stage in STAGES}
        print(json.dumps({"stages": stages, "data_sets": list_numbers(statuses)}), file=stdout)


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
    """Tell, before any GPU: tokens, bytes, requests, GPU-hours, money, and what looks wrong."""
    stdout = _claim_stdout() if as_json else sys.stdout
    from rayfuse.plan.command import run_plan
    from rayfuse.runtime.console import open_console

    settings = [each for each in (recipe if example else None, *(overrides or [])) if each]
    if tokens is not None:
        settings.append(f"plan.tokens={tokens!r}")
    values = run_plan(recipe, example, settings, open_console(to_stderr=as_json), probe=probe)
    if as_json:
        print(json.dumps(values), file=stdout)


@app.command()
def doctor(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe and the cluster of RAY_ADDRESS, before spending. Exit code 1 if errors."""
    stdout = _claim_stdout() if as_json else sys.stdout
    from rayfuse.config.load import read_recipe
    from rayfuse.doctor.command import examine
    from rayfuse.doctor.show import print_findings, to_values
    from rayfuse.runtime.console import open_console

    findings = examine(read_recipe(recipe, overrides))
    print_findings(findings, open_console(to_stderr=as_json))
    if as_json:
        print(json.dumps(to_values(findings)), file=stdout)
    if any(finding.severity == "error" for finding in findings):
        sys.exit(FAILED)


@app.command()
def verify(
    recipe: RecipePath,
    overrides: Overrides = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write corrupt shards again; remove orphans.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read and check every shard; only --repair needs a cluster. Exit code 1 if one is corrupt."""
    stdout = _claim_stdout() if as_json else sys.stdout
    from rayfuse.config.load import read_recipe
    from rayfuse.run.layout import plan_layout
    from rayfuse.runtime.console import ProgressBars, open_console
    from rayfuse.status import list_numbers, print_verified, repair_layout, verify_layout

    console = open_console(to_stderr=as_json)
    settings = read_recipe(recipe, overrides)
    layout = plan_layout(settings)
    with ProgressBars(console) as bars:
        found = verify_layout(layout, bars)
    print_verified(found, console)
    is_corrupt = any(each.corrupt for each in found.values())
    if repair:
        stages = repair_layout(settings, layout, found)
        if stages:
            _run_recipe(recipe, overrides, tuple(stages), False, console)
    if as_json:
        print(json.dumps({"data_sets": list_numbers(found), "repaired": repair}), file=stdout)
    if is_corrupt and not repair:
        _fail(f"shards are corrupt: rayfuse verify {recipe} --repair writes them again", FAILED)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A tokenizer (folder or hub id), or a recipe.")],
    target: Annotated[
        str | None, typer.Argument(help="A tokenizer; of a recipe, the name of one source.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file to tokenise.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a picture of the alignment.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how two tokenizers align: coverage, what is lost, the worst tokens."""
    stdout = _claim_stdout() if as_json else sys.stdout
    from rayfuse.inspect.command import inspect_pairs, is_recipe, print_report

    results = inspect_pairs(source, target, text, html)
    if as_json:
        numbers = {"pairs": results} if is_recipe(source) else results[0]
        print(json.dumps(numbers, ensure_ascii=False), file=stdout)
        return
    for numbers in results:
        print_report(numbers)
    if html:
        print(f"picture: {html}")


@app.command()
def init() -> None:
    """Print a commented recipe to start from: `rayfuse init > my.yaml`."""
    from rayfuse.config.template import STARTER

    print(STARTER, end="")


@app.command()
def demo(
    storage: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="Of the models and the training.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run a whole fusion on this machine, offline, on text and models made on the spot."""
    began = time.monotonic()
    stdout = _claim_stdout() if as_json else sys.stdout
    from rayfuse.runtime.console import ProgressBars, open_console

    console = open_console(to_stderr=as_json)
    root = storage.absolute()
    console.print(f"rayfuse demo: three tiny LLMs are trained, then fused into a fourth, in {root}")
    _check_folder(root)
    from rayfuse.runtime.connect import join_cluster

    join_cluster()
    from rayfuse.demo.stage import prepare_demo

    with ProgressBars(console) as bars:
        recipe = prepare_demo(str(root), seed, bars)
    from rayfuse.pipeline import STAGES

    result = _run_recipe(recipe, None, STAGES, False, console)
    result["seconds"] = round(time.monotonic() - began, 1)
    console.print(f"the whole demo took {result['seconds']:.0f} s; its recipe: {recipe}")
    console.print(f"run it again, changed:  rayfuse run {recipe} train.lambda=0.9")
    if as_json:
        print(json.dumps(result), file=stdout)


def _claim_stdout() -> TextIO:
    """Return stdout for the one JSON object; whatever else is printed, by Ray too, goes to stderr.

    It is never given back: Ray prints its warnings whenever they come, even after our last word.
    """
    stdout, sys.stdout = sys.stdout, sys.stderr
    return stdout


def _check_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".probe").write_text("")
        (root / ".probe").unlink()
    except OSError as error:
        raise ValueError(f"storage is {str(root)!r}, which cannot be written: {error}") from error


def _run_recipe(
    path: Path,
    overrides: list[str] | None,
    stages: tuple[str, ...],
    as_json: bool,
    console: Any = None,
) -> dict[str, Any]:
    """Run stages of a recipe file, print what happens, and return the numbers."""
    began = time.monotonic()
    stdout = _claim_stdout() if as_json else sys.stdout
    from rayfuse.config.load import read_recipe
    from rayfuse.pipeline import StageResult, is_stage_done, prepare_run, run_stages
    from rayfuse.runtime.console import ProgressBars, open_console

    console = console or open_console(to_stderr=as_json)
    recipe = read_recipe(path, overrides)
    layout = prepare_run(recipe)
    console.print(f"recipe {path}: {', '.join(stages)} in {layout.store.root}")
    if layout.corpus_rows.is_reused:
        models = ", ".join(model.model for model in layout.corpus_rows.cut_for)
        console.print(
            f"rows: kept as they were first cut, for {models} (corpus.recut: true cuts them anew)"
        )

    def tell(result: StageResult) -> None:
        done = "done before" if result.was_done else f"done in {result.seconds:.1f} s"
        console.print(f"{result.stage:<9} {done}", highlight=False)

    if all(is_stage_done(stage, layout) for stage in stages):
        console.print("nothing to do: everything is done already", highlight=False)
    else:
        with ProgressBars(console) as bars:
            run_stages(recipe, layout, stages, bars, tell)
    numbers = _summarise(layout, stages, console, path)
    numbers["seconds"] = round(time.monotonic() - began, 1)
    if as_json:
        print(json.dumps(numbers), file=stdout)
    return numbers


def _summarise(layout: Any, stages: tuple[str, ...], console: Any, path: Path) -> dict[str, Any]:
    """Print the numbers of a run and the next command, and return them."""
    from rayfuse.pipeline import STAGES, is_stage_done

    numbers: dict[str, Any] = {"stages": {s: is_stage_done(s, layout) for s in stages}}
    for name, data in {"corpus": layout.corpus, **layout.captured}.items():
        commits = data.commits().values()
        rejects = sum(commit.rejects for commit in commits)
        if commits:
            tokens = sum(commit.tokens for commit in commits)
            numbers[name] = {"shards": len(commits), "tokens": tokens, "rejects": rejects}
            console.print(
                f"  {name:<18} {len(commits)} shards, {tokens:,} tokens, {rejects} rejected",
                highlight=False,
            )
    if is_stage_done("evaluate", layout) and stages[-1] in ("evaluate", "report"):
        numbers |= _print_scores(layout, console)
    following = [stage for stage in STAGES if not is_stage_done(stage, layout)]
    if following:
        console.print(f"next: rayfuse {following[0]} {path}", highlight=False)
    return numbers


def _print_scores(layout: Any, console: Any) -> dict[str, Any]:
    """Print the table of scores and, if the report is there, its verdict; return both."""
    from rayfuse.evaluate.scores import bits_per_byte
    from rayfuse.report.gather import read_evaluations, read_task_scores
    from rayfuse.report.stage import FINDINGS_FILE, PAGE_FILE, is_report_current
    from rayfuse.report.tables import TASK_NOTE, build_table, build_task_table

    evaluations = read_evaluations(layout)
    title = "bits per byte on held-out text (lower is better)"
    _print_table(build_table(evaluations), title, console)
    tasks = read_task_scores(layout, list(evaluations))
    if tasks:
        _print_table(build_task_table(evaluations, tasks), TASK_NOTE, console)
    numbers: dict[str, Any] = {
        "models": {
            name: {"role": each.role, "bits_per_byte": bits_per_byte(each.documents)}
            for name, each in evaluations.items()
        },
        "tasks": {
            task: {name: each.value for name, each in scores.items()}
            for task, scores in tasks.items()
        },
    }
    if is_report_current(layout):
        verdict = json.loads(layout.store.read(FINDINGS_FILE))["verdict"]
        console.print("\n".join([verdict["headline"], *verdict["sentences"]]), highlight=False)
        numbers["report"] = f"{layout.store.root}/{PAGE_FILE}"
        console.print(f"report: {numbers['report']}", highlight=False)
    return numbers


def _print_table(scores: Any, title: str, console: Any) -> None:
    from rich.table import Table

    from rayfuse.report.tables import render_rich

    header, *rows = render_rich(scores)
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
