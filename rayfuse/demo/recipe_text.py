"""Write the recipe of the demo, which its comments explain to users."""

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path

from rayfuse.demo.specs import CONTEXT_TOKENS, ModelSpec

TEMPLATE_FILE = importlib.resources.files("rayfuse.demo") / "recipe.yaml"
"""The recipe with `{placeholders}` for `str.format`."""

SHARD_TOKENS = 20_000
LEARNING_RATE, BASELINE_LEARNING_RATE = 0.006, 0.0005
"""For fusion higher ones are better, for CLM lower ones (LOG.md)."""
ROWS_PER_STEP = 8
EPOCHS = 6
VALIDATE_EVERY_STEPS = 25


def render_recipe(root: Path, seed: int, specs: Sequence[ModelSpec]) -> str:
    """Fill the template of the demo's recipe, as YAML.

    Args:
        root: The storage folder; models and documents are below its `demo`.
        seed: The seed of the order in which rows are trained on.
        specs: The sources, and last the target.
    """
    folder = root / "demo"
    *sources, target = specs
    lines = [f"  - {{name: {spec.name}, model: {_quote(folder / spec.name)}}}" for spec in sources]
    return TEMPLATE_FILE.read_text(encoding="utf-8").format(
        file=root / "recipe.yaml",
        storage=_quote(root),
        seed=seed,
        corpus=_quote(folder / "corpus.jsonl"),
        max_tokens=CONTEXT_TOKENS,
        shard_tokens=SHARD_TOKENS,
        target=_quote(folder / target.name),
        sources="\n".join(lines),
        learning_rate=LEARNING_RATE,
        baseline_learning_rate=BASELINE_LEARNING_RATE,
        epochs=EPOCHS,
        validate=VALIDATE_EVERY_STEPS,
        rows=ROWS_PER_STEP,
        held_out=_quote(folder / "held_out.jsonl"),
    )


def _quote(path: Path) -> str:
    """Quote a path for YAML: every JSON string is a valid YAML string."""
    return json.dumps(str(path))
