"""The table of engines, by the backend that a recipe names."""

from dataclasses import dataclass
from importlib.util import find_spec

from rayfuse.capture.engines.base import Engine, LoadEngine
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.engines.vllm_engine import VllmEngine
from rayfuse.config.base import UserError
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import BackendName, SourceSettings


@dataclass(frozen=True)
class EngineEntry:
    """How an engine is loaded, and what it needs."""

    load: LoadEngine
    extra: str | None = None
    """The optional package that it needs, which is also the extra of rayfuse that installs it."""


# What each backend can do (several GPUs, draws) is in config.models.BACKENDS, since recipes are
# checked where this package's heavy libraries may be absent.
ENGINES: dict[BackendName, EngineEntry] = {
    "transformers": EngineEntry(TransformersEngine),
    "vllm": EngineEntry(VllmEngine, extra="vllm"),
}


def load_recipe_engine(source: SourceSettings, settings: CaptureSettings) -> Engine:
    """Load a source's model into the engine of its backend."""
    return ENGINES[source.backend].load(source, settings)


def check_backend(source: SourceSettings) -> None:
    """Check that a source's backend is installed on this node; this needs no GPU.

    Raises:
        UserError: It is not installed.
    """
    extra = ENGINES[source.backend].extra
    if extra is not None and find_spec(extra) is None:
        raise UserError(
            f"source {source.name}: backend is {source.backend!r}, which is not installed here; "
            f"run pip install 'rayfuse[{extra}]' on all nodes, or use backend transformers"
        )
