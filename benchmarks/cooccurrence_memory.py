"""How much memory the counts of the `cooccurrence` method take for vocabularies of 32k x 152k.

    python benchmarks/cooccurrence_memory.py [--json]

A shard's counts are added one after the other, as the align stage does, until the total has as many
distinct pairs as a very large corpus would show. A dense table of 32k x 152k float64 is 36 GiB.
"""

import argparse
import json
import resource

import numpy as np

from rayfuse.align.methods.cooccurrence import (
    SOURCE_SHIFT,
    PairCounts,
    add_counts,
    choose_most_matched,
)

BAR_GIB = 2.0
SOURCE_VOCAB, TARGET_VOCAB = 152_000, 32_000
SHARDS, PAIRS_PER_SHARD = 40, 500_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    total = add_counts([])
    for _ in range(SHARDS):
        sources = random.integers(0, SOURCE_VOCAB, PAIRS_PER_SHARD)
        targets = random.integers(0, TARGET_VOCAB, PAIRS_PER_SHARD)
        shard = PairCounts(
            (sources << SOURCE_SHIFT) | targets, np.ones(PAIRS_PER_SHARD, dtype=np.int64)
        )
        total = add_counts([total, shard])
    choose_most_matched(total, np.full(SOURCE_VOCAB, -1, dtype=np.int32))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {
        "benchmark": "cooccurrence_memory",
        "value": round(peak, 2),
        "unit": "GiB at the peak",
        "bar": BAR_GIB,
        "holds": peak <= BAR_GIB,
        "distinct_pairs": len(total.pairs),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    held = "holds" if result["holds"] else "MISSED"
    print(f"{peak:.2f} GiB for {len(total.pairs):,} distinct pairs (bar {BAR_GIB} GiB): {held}")


if __name__ == "__main__":
    main()
