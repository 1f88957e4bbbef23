"""The notebook runs in a real kernel, and shows what its reader is to see: no noise, no traces."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "docs" / "tutorial" / "rayfuse.ipynb"
TIMEOUT_SECONDS = 1100

pytestmark = [
    pytest.mark.slow,  # each test starts a kernel, and the first a Ray cluster
    pytest.mark.ray,
]


def run_cells(notebook: Any, folder: Path, **options: Any) -> list[Any]:
    """Run a notebook in a kernel that works in a folder; return the outputs of each code cell."""
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        **options,
    )
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""})
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def read_streams(outputs: list[Any], name: str) -> str:
    """Join what a cell has written to `stdout` or `stderr`."""
    return "".join(output.text for output in outputs if output.get("name") == name)


def list_shown(outputs: list[Any], kind: str = "text/plain") -> list[str]:
    """List the displays and the value of a cell, in one of their forms."""
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_the_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 8
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]


def test_the_notebook_runs_and_shows_bars_tables_and_plots(tmp_path: Path):
    outputs = run_cells(nbformat.read(NOTEBOOK, as_version=4), tmp_path)
    opened, plan, executed, scores, frame, shares, other, error = outputs
    assert not "".join(read_streams(cell, "stderr") for cell in outputs)
    assert list_shown(opened)[0].startswith("<Run of a recipe: code, prose -> ")
    assert "capture prose" in list_shown(plan)[0]
    (bars,) = list_shown(executed)
    titles = ["corpus rows", "capture code", "capture prose", "train fused", "evaluate fused"]
    lines = bars.splitlines()
    for title in titles:
        (line,) = [line for line in lines if line.startswith(f"{title} ")]
        found = re.search(r"━ (\d+)/(\d+) +(?:shards|steps) .* left 0:00:00$", line)
        assert found is not None and found[1] == found[2], line
    printed = read_streams(executed, "stdout")
    assert "bits per byte on held-out text" in printed
    assert "\x1b" not in printed
    for plots in (scores, shares):
        assert len(list_shown(plots, "image/png")) == 1
    assert "top_probs" in list_shown(frame)[0]
    assert "corpus    complete before" in read_streams(other, "stdout")
    first, second = (float(line.split()[-1]) for line in list_shown(other)[-1].splitlines()[:2])
    assert first != second
    assert "did you mean 'learning_rate'?" in read_streams(error, "stdout")


BARS = """
from rayfuse.runtime.console import ProgressBars, open_console
from rayfuse.runtime.progress import ProgressEvent

with ProgressBars(open_console(to_stderr=True)) as bars:
    bars(ProgressEvent("train", "fused", note="few steps"))
    for step in range(5):
        bars(ProgressEvent("train", "fused", step, 4, "steps", f"loss {step}"))
"""


def test_bars_are_one_output_of_plain_text_and_notices_are_on_stdout(tmp_path: Path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BARS)])
    (outputs,) = run_cells(notebook, tmp_path)
    (bars,) = list_shown(outputs)
    assert re.fullmatch(r"train fused +━{20} 4/4 steps [\d.]+/s loss 4 \S+ left 0:00:00", bars)
    assert read_streams(outputs, "stdout").split("\n")[0] == "  train fused: few steps"
    assert not read_streams(outputs, "stderr")


def test_a_wrong_setting_is_one_message_and_other_errors_have_their_traceback(tmp_path: Path):
    cells = [
        "import asyncio, rayfuse\nassert asyncio.get_running_loop().is_running()",
        "recipe = {'storage': 'run', 'corpus': {'documents': 'none.jsonl'}, 'seed': 'x',\n"
        "          'target': {'model': 'none'}, 'sources': [{'name': 'a', 'model': 'none'}]}\n"
        "rayfuse.open_run(recipe)",
        "def execute():\n    return rayfuse.open_run(recipe, seed=1).execute()\nexecute()",
        "1 / 0",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    start, wrong, missing, bug = run_cells(notebook, tmp_path, allow_errors=True)
    assert not start
    trace = "\n".join(wrong[-1].traceback)
    assert trace.startswith("----> 3 rayfuse.open_run(recipe)\n\nRecipeError: seed is 'x': ")
    trace = "\n".join(missing[-1].traceback)
    assert trace.startswith("----> 2     return rayfuse.open_run(recipe, seed=1).execute()\n\nUser")
    assert "File" not in trace
    assert "ZeroDivisionError" in "\n".join(bug[-1].traceback)
    assert len(bug[-1].traceback) > 1
