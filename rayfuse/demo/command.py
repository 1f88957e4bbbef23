"""`rayfuse demo`: create the text, the models and the recipe of a small fusion."""

from pathlib import Path

from rich.console import Console

from rayfuse.config.base import UserError
from rayfuse.runtime.connect import join_cluster
from rayfuse.runtime.console import ProgressBars


def create_demo(root: Path, seed: int, console: Console, *, train_models: bool) -> Path:
    """Create the text, models and recipe of the demo's run; see `prepare_demo`.

    Returns:
        The recipe's path.

    Raises:
        UserError: The folder cannot be written, or RAY_ADDRESS names no cluster.
    """
    first = "are trained, then fused" if train_models else "are fused"
    console.print(f"rayfuse demo: three tiny LLMs {first} into a fourth, in {root}")
    _check_folder(root)
    join_cluster()
    from rayfuse.demo.stage import prepare_demo  # imports ray, which reads what join_cluster sets

    with ProgressBars(console) as bars:
        return prepare_demo(str(root), seed, bars, train_models=train_models)


def _check_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".probe").write_text("")
        (root / ".probe").unlink()
    except OSError as error:
        raise UserError(f"storage is {str(root)!r}, which cannot be written: {error}") from error
