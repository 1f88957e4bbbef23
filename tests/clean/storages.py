"""A storage with rows of two recipes, and what jobs leave in it."""

import json
from pathlib import Path
from typing import Any

from rayfuse import api
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.runtime.console import PlainConsole
from rayfuse.storage.dataset import DataSet

OTHER = "align.method=exact"


def clean(*arguments: str, delete: bool = True, idle_hours: float = 1.0) -> dict[str, Any]:
    console = PlainConsole(None, quiet=True)
    return api.clean_runs(arguments, console, delete=delete, idle_hours=idle_hours)


def names_of(result: dict[str, Any]) -> list[str]:
    return sorted(item["name"] for item in result["items"])


def layout_of(*arguments: str) -> Layout:
    return plan_layout(api.load_run_with(arguments[0], arguments[1:]).recipe, ALIGN_FACTS)


def aligned_folders(*arguments: str) -> list[str]:
    return sorted(data.folder for data in layout_of(*arguments).aligned.values())


def snapshot(recipe: str) -> dict[str, bytes]:
    root = Path(recipe).with_name("storage")
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def start_capture(recipe: str) -> DataSet:
    """Write the first shard of a capture with another top_k."""
    data = layout_of(recipe, "capture.top_k=3").captured["neox"]
    done = layout_of(recipe).captured["neox"]
    data.claim({"recipe": {}})
    data.write_shard(0, done.read_shard(done.read_commit(0)), tokens=1)
    return data


def start_training(recipe: str) -> str:
    """Write the files that a training of another learning rate has, and return its folder."""
    layout = layout_of(recipe, "train.learning_rate=0.5")
    folder = layout.runs[0].folder
    layout.store.write(f"{folder}/checkpoints/records/step_00000001-a-0.json", b"{}")
    layout.store.write(f"{folder}/checkpoints/step_00000001-a/ds/x.pt", b"0" * 1000)
    steps = [{"seconds": 1800.0, "num_workers": 2}, {"seconds": 1800.0, "num_workers": 2}]
    lines = "".join(json.dumps(step) + "\n" for step in steps)
    layout.store.write(f"{folder}/metrics.jsonl", lines.encode())
    return folder
