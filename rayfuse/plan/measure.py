"""`plan --probe`: measured rates and latencies, within a time, and what they mean for a plan."""

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from rayfuse.config.recipe import dump_recipe
from rayfuse.plan.cost import Rates, assumed_rate
from rayfuse.plan.estimate import list_work
from rayfuse.plan.inputs import Setup
from rayfuse.plan.probe import PROBED_TRAINING, Measured, Request
from rayfuse.plan.work import Work
from rayfuse.storage.store import Store

PROBE_SECONDS = 60.0

STORAGE_SECONDS = 5.0
"""Of them, for the storage at most."""

SMALL_BYTES, MAX_BYTES = 1000, 16_000_000
"""A commit record; a shard, at most."""


@dataclass(frozen=True)
class StorageSpeed:
    """How fast the storage answers this machine."""

    put_seconds: float
    """A thousand bytes: the median of a few."""
    get_seconds: float
    shard_bytes: int
    shard_put_seconds: float
    """As many bytes as a captured shard has, but no more than 16 MB."""
    shard_get_seconds: float


@dataclass(frozen=True)
class Probe:
    """What a probe has measured."""

    seconds: float
    measured: tuple[Measured, ...]
    storage: StorageSpeed | None


def run_probe(setup: Setup, seconds: float = PROBE_SECONDS) -> Probe:
    """Return what can be measured within a time, on the cluster of RAY_ADDRESS or else here.

    Raises:
        ValueError: There is no text to measure with.
    """
    began = time.monotonic()
    request = _make_request(setup, seconds)
    storage = None
    if setup.layout is not None:
        storage = probe_storage(
            setup.layout.store, _shard_bytes(setup), min(STORAGE_SECONDS, seconds / 4)
        )
    left = began + seconds - time.monotonic()
    request = Request(request.recipe, request.texts, request.ends_document, left)
    if os.environ.get("RAY_ADDRESS"):
        from rayfuse.plan.stage import probe_on_cluster

        found = probe_on_cluster(setup.recipe, request)
    else:
        found = _probe_here(request)
    titles = [f"capture {source.name}" for source in setup.recipe.sources] + [PROBED_TRAINING]
    by_title = {each.title: each for each in found}
    missing = f"not measured within {seconds:.0f} s"
    measured = (by_title.get(title) or Measured(title, "", None, missing) for title in titles)
    return Probe(time.monotonic() - began, tuple(measured), storage)


def _make_request(setup: Setup, seconds: float) -> Request:
    """Return what is to be measured: on rows of the corpus if there are any, else of documents."""
    rows = setup.sample
    if setup.layout is not None:
        shards = sorted(setup.layout.corpus.list_committed())
        if shards:
            corpus = setup.layout.corpus
            rows = corpus.read_shard(corpus.read_commit(shards[0]))
    if rows is None or not rows.num_rows:
        raise ValueError("there is no text to probe with: no corpus yet, and no documents here")
    rows = rows.slice(0, 256)
    recipe = dump_recipe(setup.recipe)
    return Request(recipe, rows["text"].to_pylist(), rows["ends_document"].to_pylist(), seconds)


def _probe_here(request: Request) -> list[Measured]:
    """Measure in a process of its own, which is ended when the time is up."""
    deadline = time.monotonic() + request.seconds
    child = subprocess.Popen(
        [sys.executable, "-m", "rayfuse.plan.probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(child.stdout,), daemon=True)
    reader.start()
    try:
        child.stdin.write(json.dumps(asdict(request)))
        child.stdin.close()
        reader.join(timeout=max(deadline - time.monotonic(), 0))
    except BrokenPipeError:
        pass  # it has died: nothing is measured, and that is told
    finally:
        child.kill()
        child.wait()
        reader.join()
    return [Measured(**json.loads(line)) for line in lines if line.endswith("\n")]


def probe_storage(store: Store, shard_bytes: int, seconds: float) -> StorageSpeed:
    """Return how fast a storage takes and gives a small file and one as large as a shard.

    Raises:
        OSError: It cannot be written.
    """
    deadline = time.monotonic() + seconds
    small: list[tuple[float, float]] = []
    while len(small) < 5 and (not small or time.monotonic() < deadline):
        small.append(_time_file(store, SMALL_BYTES))
    size = min(shard_bytes, MAX_BYTES)
    large = _time_file(store, size)
    puts, gets = zip(*small, strict=True)
    return StorageSpeed(statistics.median(puts), statistics.median(gets), size, *large)


def _time_file(store: Store, num_bytes: int) -> tuple[float, float]:
    """Return the seconds of writing and of reading a file, which is removed."""
    name, data = f".probe-{uuid.uuid4().hex}", os.urandom(num_bytes)
    try:
        began = time.monotonic()
        store.write(name, data)
        written = time.monotonic()
        store.read(name)
        return written - began, time.monotonic() - written
    finally:
        store.remove(name)


def _shard_bytes(setup: Setup) -> int:
    works = [work for work in list_work(setup) if work.stage == "capture"]
    return int(max(work.stored_bytes / max(work.shards, 1) for work in works)) or 1


def find_kind(device: str, kinds: Iterable[str]) -> str | None:
    """Return the kind of GPU that a device's name names."""
    found = [kind for kind in kinds if re.search(rf"\b{re.escape(kind)}\b", device)]
    return max(found, key=len, default=None)


def rates_of(probe: Probe, setup: Setup) -> Rates:
    """Return the measured rates of kinds of GPU that the plan knows, by work and kind."""
    plan = setup.recipe.plan
    rates: dict[tuple[str, str], float] = {}
    for each in probe.measured:
        kind = find_kind(each.device, plan.gpus)
        if kind is None or each.tokens_per_second is None:
            continue
        if each.title == PROBED_TRAINING:
            rates[each.title, kind] = each.tokens_per_second
            rates["train clm", kind] = each.tokens_per_second * plan.fused_step_ratio
        else:
            rates[each.title, kind] = each.tokens_per_second * plan.pipeline_share
    return rates


def print_probe(probe: Probe, setup: Setup, console: Console) -> None:
    """Print what was measured beside what is assumed."""
    table = Table(
        *("work", "device", "tokens/s", "assumed", "share of peak", "hours on one"),
        title=f"what was measured, in {probe.seconds:.0f} s",
    )
    works = {work.title: work for work in list_work(setup)}
    for each in probe.measured:
        table.add_row(*_describe(each, works[each.title], setup))
    console.print(table)
    storage = probe.storage
    if storage is not None:
        console.print(
            f"storage from here: {SMALL_BYTES:,} bytes written in {storage.put_seconds:.3f} s, "
            f"read in {storage.get_seconds:.3f} s; {storage.shard_bytes:,} bytes in "
            f"{storage.shard_put_seconds:.2f} and {storage.shard_get_seconds:.2f} s",
            highlight=False,
        )
    for setting in list_calibrations(probe, setup):
        console.print(f"to plan with what was measured from now on: {setting}", highlight=False)


def list_calibrations(probe: Probe, setup: Setup) -> list[str]:
    """Return the settings that make the cost model give what was measured, as overrides."""
    plan = setup.recipe.plan
    works = {work.title: work for work in list_work(setup)}
    shares: dict[str, list[float]] = {}
    for each in probe.measured:
        kind = find_kind(each.device, plan.gpus)
        if kind is not None and each.tokens_per_second is not None:
            work = works[each.title]
            setting = "train_share" if work.stage == "train" else "forward_share"
            share = share_of_peak(each.tokens_per_second, work, setup, kind)
            shares.setdefault(f"plan.gpus.{kind}.{setting}", []).append(share)
    return [f"{name}={statistics.mean(found):.3f}" for name, found in shares.items()]


def share_of_peak(tokens_per_second: float, work: Work, setup: Setup, kind: str) -> float:
    """Return the share of a kind's peak that a measured rate is."""
    assert work.gpu is not None
    flops = work.gpu.flops / max(work.tokens, 1)
    return tokens_per_second * flops / (setup.recipe.plan.gpus[kind].peak_tflops * 1e12)


def _describe(each: Measured, work: Work, setup: Setup) -> list[str]:
    if each.tokens_per_second is None:
        return [each.title, each.device, each.note]
    plan = setup.recipe.plan
    kind = find_kind(each.device, plan.gpus)
    hours = work.tokens * (1 - work.done) / each.tokens_per_second / 3600
    cells = [each.title, each.device, f"{each.tokens_per_second:,.0f}", "", "", f"{hours:,.1f}"]
    if kind is not None and work.gpu is not None:
        cells[3] = f"{assumed_rate(work, work.gpu, plan.gpus[kind], plan):,.0f}"
        cells[4] = f"{share_of_peak(each.tokens_per_second, work, setup, kind):.0%}"
    return cells


def to_values(probe: Probe) -> dict[str, Any]:
    """Return a probe as plain values."""
    return asdict(probe)
