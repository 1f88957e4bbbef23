"""Start the GPU nodes of the capture stage shortly before the corpus stage ends."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rayfuse.config.models import SourceSettings
from rayfuse.runtime.progress import PaceEstimator, Progress, ProgressEvent
from rayfuse.runtime.resources import list_bundles, prewarm_nodes

PREWARM_SECONDS = 600.0
"""Startup time allowed for a GPU node: nodes are requested this long before they are needed."""


class _NodeRequest:
    """Requests the sources' nodes at most once, until the stack closes."""

    def __init__(self, sources: Sequence[SourceSettings], until: ExitStack) -> None:
        self.sources = sources
        self.until = until
        self.is_made = False

    def make_if_soon(self, seconds_left: float) -> None:
        """Request the nodes if the corpus will be done within `PREWARM_SECONDS`."""
        if self.is_made or seconds_left >= PREWARM_SECONDS:
            return
        self.is_made = True
        self.until.enter_context(prewarm_nodes([list_bundles(source) for source in self.sources]))


@contextmanager
def prewarm_sources(
    sources: Sequence[SourceSettings], expected_seconds: float, progress: Progress
) -> Iterator[Progress]:
    """Yield a progress callback for the corpus stage that also starts the sources' GPU nodes.

    An idle GPU node costs money. A small corpus requests the nodes at once; a large one when the
    observed pace leaves `PREWARM_SECONDS` of the held-out rows, which are the last part. The
    request ends with the context.

    Args:
        sources: The sources that the capture stage will run.
        expected_seconds: Estimated duration of the corpus stage; infinity if unknown.
        progress: Receives every event unchanged.
    """
    pace = PaceEstimator()
    with ExitStack() as until:
        request = _NodeRequest(sources, until)
        request.make_if_soon(expected_seconds)

        def report(event: ProgressEvent) -> None:
            progress(event)
            if event.stage == "corpus" and event.part == "held-out" and event.total:
                request.make_if_soon(pace.estimate_seconds_left(event))

        yield report
