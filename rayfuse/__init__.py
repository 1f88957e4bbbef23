"""rayfuse: fuse several source LLMs into one target LLM, on a Ray cluster.

Text goes in; every source scores it; the sources' distributions are aligned to the target's
tokens and fused; the target learns from them. See README.md for the commands, and docs/api.md for
the functions, which are imported when they are used: `import rayfuse` imports no other library.
"""

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayfuse.api import Run, open_run
    from rayfuse.config.base import UserError
    from rayfuse.imports.command import import_store
    from rayfuse.inspect.command import inspect_tokenizers
    from rayfuse.interop.batch import collate
    from rayfuse.interop.dataset import RowDataset, open_dataset
    from rayfuse.interop.loss import fusion_loss
    from rayfuse.plan.starter import write_recipe
    from rayfuse.status import migrate_storage

__version__ = "0.1.0"

__all__ = [
    "RowDataset",
    "Run",
    "UserError",
    "collate",
    "fusion_loss",
    "import_store",
    "inspect_tokenizers",
    "migrate_storage",
    "open_dataset",
    "open_run",
    "write_recipe",
]

MODULES = {
    "RowDataset": "rayfuse.interop.dataset",
    "Run": "rayfuse.api",
    "UserError": "rayfuse.config.base",
    "collate": "rayfuse.interop.batch",
    "fusion_loss": "rayfuse.interop.loss",
    "import_store": "rayfuse.imports.command",
    "inspect_tokenizers": "rayfuse.inspect.command",
    "migrate_storage": "rayfuse.status",
    "open_dataset": "rayfuse.interop.dataset",
    "open_run": "rayfuse.api",
    "write_recipe": "rayfuse.plan.starter",
}
"""Where each name is. No name is a submodule's: importing that would replace it."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "ipykernel" in sys.modules:  # tqdm warns of a library that notebooks may lack
        warnings.filterwarnings("ignore", "IProgress not found")
    return getattr(importlib.import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
