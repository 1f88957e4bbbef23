"""The resident memory of a process that scores rows with a model, beside what its actor requests.

    python benchmarks/actor_memory.py MODEL [BATCH_TOKENS]

Prints the memory after each step of a capture actor's life, the peak within the step, and the ratio
of the highest peak to the estimate that Ray reserves. Rows are random tokens, 512 each.
"""

import sys
import threading
import time

import numpy as np
import psutil

from rayfuse.capture.actor_memory import estimate_actor_memory
from rayfuse.capture.engines.load import load_recipe_engine
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.runtime.heap import trim_heap

GIB = 2**30

ROW_TOKENS = 512


class MemoryWatch:
    """Records the highest resident memory of this process in a thread of its own."""

    def __init__(self) -> None:
        self.process, self.peak, self.highest = psutil.Process(), 0, 0

    def start(self) -> None:
        """Start to record."""
        threading.Thread(target=self._record, daemon=True).start()

    def _record(self) -> None:
        while True:
            self.peak = max(self.peak, self.process.memory_info().rss)
            self.highest = max(self.highest, self.peak)
            time.sleep(0.005)

    def report(self, step: str) -> None:
        """Print the memory now and the peak since the last report."""
        now = self.process.memory_info().rss
        print(f"{step:<16} {now / GIB:5.2f} GiB, peak {self.peak / GIB:5.2f} GiB", flush=True)
        self.peak = 0


def main() -> None:
    """Load a model as an actor does, and score two batches."""
    source = SourceSettings(name="source", model=sys.argv[1], gpus=0)
    settings = CaptureSettings(batch_tokens=int(sys.argv[2]) if len(sys.argv) > 2 else 4096)
    watch = MemoryWatch()
    watch.start()
    watch.report("imports")
    engine = load_recipe_engine(source, settings)
    load_recipe_tokenizer(source)
    watch.report("loaded")
    trim_heap()
    watch.report("heap trimmed")
    rows = [np.arange(5, 5 + ROW_TOKENS)] * (settings.batch_tokens // ROW_TOKENS)
    engine.score_rows(rows)
    watch.report("first batch")
    engine.score_rows(rows)
    watch.report("second batch")
    tokens = settings.batch_tokens
    estimate = estimate_actor_memory(source, settings, shard_tokens=tokens, on_gpu=False)
    ratio = watch.highest / estimate
    print(f"highest peak / requested: {ratio:.2f} ({estimate / GIB:.2f} GiB are requested)")


if __name__ == "__main__":
    main()
