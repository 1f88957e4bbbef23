"""`rayfuse plan --probe`: measure throughput and storage latency, and calibrate the cost model."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.plan.cost import Rates
from rayfuse.plan.estimate import Work, list_work
from rayfuse.plan.inputs import PlanInputs
from rayfuse.storage.store import Store

MAX_PROBE_SECONDS = 60.0

MAX_STORAGE_SECONDS = 5.0
"""Part of the probe's time for measuring the storage."""

SMALL_BYTES, MAX_BYTES = 1000, 16_000_000
"""Size of a commit record, and the largest file that is measured in place of a shard."""

PROBED_TRAINING = "train fused"
"""Title of the work item that stands for all training."""


@dataclass(frozen=True)
class ProbeRequest:
    """The recipe and the text to measure it on."""

    recipe: dict[str, Any]
    texts: list[str]
    ends_document: list[bool]
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """The throughput of one work item on one device."""

    title: str
    """The item's title in the plan."""
    device: str
    tokens_per_second: float | None
    """Per GPU. None where it was not measured."""
    note: str = ""
    """Why it was not measured."""


@dataclass(frozen=True)
class StorageSpeed:
    """Latency and throughput of the storage, seen from this process."""

    put_seconds: float
    """A file of `SMALL_BYTES`: the median of a few."""
    get_seconds: float
    shard_bytes: int
    """Size of a captured shard, at most `MAX_BYTES`."""
    shard_put_seconds: float
    shard_get_seconds: float


@dataclass(frozen=True)
class Probe:
    """The result of a probe."""

    seconds: float
    measured: tuple[Measurement, ...]
    storage: StorageSpeed | None


def run_probe(
    inputs: PlanInputs,
    measure: Callable[[ProbeRequest], list[Measurement]],
    seconds: float = MAX_PROBE_SECONDS,
) -> Probe:
    """Measure models and storage within a time limit.

    Args:
        inputs: The recipe, and the text to measure with.
        measure: Measures the models, such as `probe_locally`.
        seconds: The time limit.

    Raises:
        UserError: There is no text to measure with.
    """
    began = time.monotonic()
    request = _make_request(inputs, seconds)
    storage = None
    if inputs.layout is not None:
        storage = probe_storage(
            inputs.layout.store, _shard_bytes(inputs), min(MAX_STORAGE_SECONDS, seconds / 4)
        )
    left = began + seconds - time.monotonic()
    found = measure(replace(request, seconds=left))
    by_title = {measurement.title: measurement for measurement in found}
    missing = f"not measured within {seconds:.0f} s"
    measured = (
        by_title.get(title) or Measurement(title, "", None, missing)
        for title in list_titles(inputs.recipe)
    )
    return Probe(time.monotonic() - began, tuple(measured), storage)


def list_titles(recipe: Recipe) -> list[str]:
    """List the titles of the work items that a probe measures."""
    return [*(f"capture {source.name}" for source in recipe.run_sources), PROBED_TRAINING]


def _make_request(inputs: PlanInputs, seconds: float) -> ProbeRequest:
    """Take rows of the corpus if there are any, else of the sampled documents."""
    rows = inputs.sample
    if inputs.layout is not None:
        shards = sorted(inputs.layout.corpus.list_committed())
        if shards:
            corpus = inputs.layout.corpus
            rows = corpus.read_shard(corpus.read_commit(shards[0]))
    if rows is None or not rows.num_rows:
        raise UserError(
            "there is no text to probe with: the corpus is not built yet, and corpus.documents "
            "cannot be read here; run `rayfuse corpus` first, or give documents that can be read"
        )
    rows = rows.slice(0, 256)
    return ProbeRequest(
        dump_recipe(inputs.recipe),
        rows["text"].to_pylist(),
        rows["ends_document"].to_pylist(),
        seconds,
    )


def probe_locally(request: ProbeRequest) -> list[Measurement]:
    """Measure on this machine, in a process of its own, which is killed at the deadline.

    A thread of this process could not be interrupted in a forward pass.
    """
    deadline = time.monotonic() + request.seconds
    with subprocess.Popen(
        [sys.executable, "-m", "rayfuse.plan.measure", str(deadline)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            left = max(deadline - time.monotonic(), 0)
            output, _ = child.communicate(json.dumps(asdict(request)), timeout=left)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()  # keeps everything written before the deadline
        finally:
            child.kill()
    lines = output.splitlines(keepends=True)  # the last one may be incomplete
    return [Measurement(**json.loads(line)) for line in lines if line.endswith("\n")]


def probe_storage(store: Store, shard_bytes: int, seconds: float) -> StorageSpeed:
    """Measure the time to write and to read a small file, and one as large as a shard.

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
    """Measure the seconds to write and to read a file, and remove it."""
    name, data = f".probe-{uuid.uuid4().hex}", os.urandom(num_bytes)
    try:
        began = time.monotonic()
        store.write(name, data)
        written = time.monotonic()
        store.read(name)
        return written - began, time.monotonic() - written
    finally:
        store.remove(name)


def _shard_bytes(inputs: PlanInputs) -> int:
    works = [work for work in list_work(inputs) if work.stage == "capture"]
    return int(max(work.stored_bytes / max(work.shards, 1) for work in works)) or 1


def find_kind(device: str, kinds: Iterable[str]) -> str | None:
    """Find the kind of GPU in a device's name."""
    found = [kind for kind in kinds if re.search(rf"\b{re.escape(kind)}\b", device)]
    return max(found, key=len, default=None)


def rates_of(probe: Probe, inputs: PlanInputs) -> Rates:
    """Collect the measured rates of those kinds of GPU that are in the plan.

    Capture on Ray keeps a share of the bare forward loop's throughput (`plan.pipeline_share`), and
    a step without fusion is faster than a fused one (`plan.fused_step_ratio`).
    """
    plan = inputs.recipe.plan
    rates: dict[tuple[str, str], float] = {}
    for measurement in probe.measured:
        kind, rate = find_kind(measurement.device, plan.gpus), measurement.tokens_per_second
        if kind is None or rate is None:
            continue
        if measurement.title == PROBED_TRAINING:
            rates[measurement.title, kind] = rate
            rates["train clm", kind] = rate * plan.fused_step_ratio
        else:
            rates[measurement.title, kind] = rate * plan.pipeline_share
    return rates


def list_calibrations(probe: Probe, inputs: PlanInputs) -> list[str]:
    """List the overrides that make the cost model reproduce the measured rates."""
    plan = inputs.recipe.plan
    works = {work.title: work for work in list_work(inputs)}
    shares: dict[str, list[float]] = {}
    for measurement in probe.measured:
        kind = find_kind(measurement.device, plan.gpus)
        if kind is not None and measurement.tokens_per_second is not None:
            work = works[measurement.title]
            setting = "train_share" if work.stage == "train" else "forward_share"
            share = share_of_peak(measurement.tokens_per_second, work, inputs, kind)
            shares.setdefault(f"plan.gpus.{kind}.{setting}", []).append(share)
    return [f"{name}={statistics.mean(found):.3f}" for name, found in shares.items()]


def share_of_peak(tokens_per_second: float, work: Work, inputs: PlanInputs, kind: str) -> float:
    """Compute the share of a GPU's peak that a measured rate reaches (MFU)."""
    assert work.gpu is not None
    flops = work.gpu.flops / max(work.tokens, 1)
    return tokens_per_second * flops / (inputs.recipe.plan.gpus[kind].peak_tflops * 1e12)
