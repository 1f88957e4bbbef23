"""Time and memory of the driver to plan, list and resume a million shards.

    python benchmarks/shards.py [--shards N] [--json]

The object store is simulated: it generates names on request, and answers listings in pages of a
thousand, each with the latency of a real store. The code under test is that of a run: it checks
that the corpus is complete (each of its files is looked up in a listing), resumes a capture that is
half done (its records and its files are listed), and splits the missing shards into blocks.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import RECORDS
from rayfuse.storage.todo import list_missing, split_shards

BAR_SECONDS, BAR_GIB = 30.0, 1.0
PAGE_SECONDS, PAGE_NAMES = 0.1, 1000
"""Latency of a page of a listing, and the names on it."""
ATTEMPT = "0123456789ab"


class SimulatedStore:
    """Generates the names of shards on request; the few other files are in memory."""

    root = "simulated://bucket"
    lists_by_prefix = True

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards
        self.files: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        """Read a file."""
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        self.files[name] = data

    def create(self, name: str, data: bytes) -> bool:
        """Create a file if it is absent."""
        return self.files.setdefault(name, data) == data

    def remove(self, name: str) -> None:
        """Delete a file."""
        self.files.pop(name, None)

    def sizes(self, folder: str, prefix: str = "") -> dict[str, int]:
        """List all shards of the corpus, or every other one of the capture."""
        step = 1 if folder.startswith("corpus") else 2
        suffix = f"-{ATTEMPT}.parquet" if folder.endswith("data") else ".json"
        found = {
            f"{shard:05d}{suffix}": 100_000_000
            for shard in self._find_shards(prefix)
            if shard % step == 0
        }
        time.sleep(PAGE_SECONDS * (len(found) // PAGE_NAMES + 1))
        return found

    def _find_shards(self, prefix: str) -> Iterator[int]:
        """Yield the shards with names, of five digits or more, that start with two given digits."""
        for num_digits in range(5, len(str(self.num_shards)) + 1):
            block = 10 ** (num_digits - 2)
            first = int(prefix) * block
            if num_digits == 5 or first >= 10 ** (num_digits - 1):
                yield from range(first, min(first + block, self.num_shards))


def write_manifest(store: SimulatedStore, num_shards: int) -> None:
    """Write the manifest of a complete corpus, as `DataSet.finish` does."""
    shards = range(num_shards)
    table = pa.table(
        {
            "shard": pa.array(shards, pa.int64()),
            "file": [f"data/{shard:05d}-{ATTEMPT}.parquet" for shard in shards],
            "num_bytes": pa.array([100_000_000] * num_shards, pa.int64()),
            "sha256": [hashlib.sha256(b"%d" % shard).hexdigest() for shard in shards],
        }
    )
    for field in list(RECORDS)[4:]:
        table = table.append_column(field, pa.nulls(num_shards, field.type))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    store.write("corpus/f/records.parquet", data)
    manifest = {
        "num_shards": num_shards,
        "rows": 0,
        "tokens": 0,
        "rejects": 0,
        "records": "records.parquet",
        "records_sha256": hashlib.sha256(data).hexdigest(),
    }
    store.write("corpus/f/manifest.json", json.dumps(manifest).encode())


def measure(store: SimulatedStore) -> dict[str, float]:
    """Plan a run over the store's shards, and measure the seconds of each step."""
    corpus, captured = (DataSet(store, name, "", "f") for name in ("corpus", "captured"))
    began = time.monotonic()
    manifest = corpus.read_manifest()
    assert manifest is not None and corpus.is_complete()
    checked = time.monotonic()
    captured.claim({"source": "a"})
    missing = list_missing(captured, manifest.num_shards, print)
    assert len(missing) == manifest.num_shards // 2
    resumed = time.monotonic()
    blocks = split_shards(missing)
    assert sum(block.num_rows for block in blocks) == len(missing)
    return {
        "corpus_checked": checked - began,
        "capture_resumed": resumed - checked,
        "split_into_blocks": time.monotonic() - resumed,
    }


def main() -> None:
    """Measure time and peak memory in a process of its own, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--manifest", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.manifest:
        run_in_child(arguments.shards, arguments.json)
        return
    store = SimulatedStore(arguments.shards)
    with open(arguments.manifest, "rb") as file:
        names = json.loads(file.readline())
        store.files = {name: file.read(size) for name, size in names.items()}
    steps = measure(store)
    seconds = sum(steps.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {
        "benchmark": "shards",
        "value": round(seconds, 1),
        "unit": "seconds",
        "bar": BAR_SECONDS,
        "peak_gib": round(peak, 2),
        "bar_gib": BAR_GIB,
        "holds": seconds <= BAR_SECONDS and peak <= BAR_GIB,
        "shards": arguments.shards,
        "steps": {name: round(value, 2) for name, value in steps.items()},
    }
    if arguments.json:
        print(json.dumps(result))
        return
    held = "holds" if result["holds"] else "MISSED"
    print(f"{arguments.shards:,} shards: {seconds:.1f} s (bar {BAR_SECONDS:.0f} s), {peak:.2f} GiB")
    print(f"(bar {BAR_GIB} GiB): {held}; {result['steps']}")


def run_in_child(num_shards: int, as_json: bool) -> None:
    """Write the manifest here, and measure in another process."""
    store = SimulatedStore(num_shards)
    write_manifest(store, num_shards)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        sizes = {name: len(data) for name, data in store.files.items()}
        file.write(json.dumps(sizes).encode() + b"\n" + b"".join(store.files.values()))
        file.flush()
        options = ["--shards", str(num_shards), "--manifest", file.name]
        options += ["--json"] if as_json else []
        subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
