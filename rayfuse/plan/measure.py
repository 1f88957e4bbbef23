"""Measure the throughput of a recipe's models within seconds.

Run as a module with a deadline, it reads a `ProbeRequest` from stdin and writes a line of JSON for
each better figure, so that no figure is lost when it is killed at the deadline.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import torch

from rayfuse.capture.engines.load import load_recipe_engine
from rayfuse.config.base import first_line
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.fuse.reader import FusedRows
from rayfuse.models.attention import prepare_packing
from rayfuse.models.causal_lm import load_causal_lm
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.plan.probe import PROBED_TRAINING, Measurement, ProbeRequest, list_titles
from rayfuse.storage.codec import TopK
from rayfuse.train.batches import Packing, Step, build_micro_batches
from rayfuse.train.deepspeed_engine import build_engine
from rayfuse.train.loop import Objective, train_steps
from rayfuse.train.model import FusionModel

MIN_SECONDS = 2.0
"""A measurement that lasted this long is precise enough."""

Report = Callable[[Measurement], None]


def measure_rate(run: Callable[[int], int], deadline: float) -> Iterator[float]:
    """Yield ever more precise rates in tokens per second, each of twice the work of the last.

    Args:
        run: Does a number of units of work, and returns their tokens.
        deadline: On the monotonic clock; work that is likely to last longer is not started.
    """
    units = 1
    while True:
        began = time.monotonic()
        tokens = run(units)
        took = time.monotonic() - began
        yield tokens / max(took, 1e-9)
        # Twice the work takes at most twice the time; the first unit only warms up.
        if time.monotonic() + 2 * took > deadline or (took > MIN_SECONDS and units > 1):
            return
        units *= 2


def measure_source(
    recipe: Recipe, source: SourceSettings, request: ProbeRequest, deadline: float
) -> Iterator[Measurement]:
    """Yield a source's throughput per GPU, measured with the engine of the capture stage."""
    settings = recipe.capture.model_copy(
        update={"batch_tokens": source.batch_tokens or recipe.capture.batch_tokens}
    )
    rows = load_recipe_tokenizer(source).encode_rows(request.texts, request.ends_document)
    engine = load_recipe_engine(source, settings)

    def score(units: int) -> int:
        chosen = [rows[number % len(rows)] for number in range(units)]
        engine.score_rows(chosen)
        return sum(map(len, chosen))

    for rate in measure_rate(score, deadline):
        per_gpu = rate / max(source.gpus or 1.0, 1.0)
        yield Measurement(f"capture {source.name}", name_device(), per_gpu)


def measure_training(
    recipe: Recipe, request: ProbeRequest, deadline: float
) -> Iterator[Measurement]:
    """Yield the throughput of one worker's fused steps, on random distributions."""
    target, settings = recipe.target, recipe.train
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _group_of_one(device):
        lm, is_packed = prepare_packing(load_causal_lm(target, device), pack=settings.pack)
        packing = Packing(
            settings.sequence_tokens or recipe.corpus.max_tokens,
            settings.micro_batch_sequences,
            is_packed,
        )
        ids = load_recipe_tokenizer(target).encode_rows(request.texts, request.ends_document)
        entries = recipe.capture.kept_entries + recipe.capture.num_draws
        batches = build_micro_batches(_make_rows(ids, lm.head.out_features, entries), packing)
        lm.model.train()
        engine = build_engine(
            FusionModel(lm, settings, num_sources=1),
            settings,
            num_steps=1000,
            num_workers=1,
            device=device,
        )
        objective = Objective(settings.clm_weight, settings.temperature, 1000, ("all",))

        def step(units: int) -> int:
            chosen = [batches[number % len(batches)] for number in range(units)]
            train_steps(
                engine,
                iter([Step(chosen, "")]),
                objective,
                first_step=0,
                num_workers=1,
                after_step=lambda _: None,
            )
            return sum(len(batch.positions) for batch in chosen)

        for rate in measure_rate(step, deadline):
            yield Measurement(PROBED_TRAINING, name_device(), rate)


def _make_rows(ids: list[np.ndarray], vocab: int, entries: int) -> FusedRows:
    """Make rows with a random distribution at every position."""
    random = np.random.default_rng(0)
    token_ids = np.concatenate(ids).astype(np.int32)
    total, part = len(token_ids), max(vocab // entries, 1)
    top_ids = random.integers(0, part, (total, entries)) + np.arange(entries) * part
    probs = random.dirichlet(np.ones(entries + 1), total).astype(np.float32)
    top = TopK(
        ids=np.minimum(top_ids, vocab - 1).astype(np.int32),
        probs=probs[:, :-1],
        tail=probs[:, -1],
    )
    lengths = np.array([len(row) for row in ids])
    return FusedRows(token_ids, lengths, top, selected=np.zeros(total, dtype=np.int64))


@contextlib.contextmanager
def _group_of_one(device: str) -> Iterator[None]:
    """Make this process a process group of its own, as DeepSpeed needs one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def name_device() -> str:
    """Name the device that models run on in this process."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def measure_item(
    recipe: Recipe, request: ProbeRequest, number: int, deadline: float, report: Report
) -> None:
    """Measure one work item, and report each better figure, or the reason for having none.

    Args:
        recipe: The recipe.
        request: The text to measure on.
        number: The item's place in `list_titles`: the sources, then training.
        deadline: On the monotonic clock.
        report: Called with each figure.
    """
    title = list_titles(recipe)[number]
    try:
        measurements = (
            measure_training(recipe, request, deadline)
            if title == PROBED_TRAINING
            else measure_source(recipe, recipe.run_sources[number], request, deadline)
        )
        for measurement in measurements:
            report(measurement)
    except (ValueError, RuntimeError, MemoryError, OSError, ImportError) as error:
        reason = first_line(error)
        report(Measurement(title, name_device(), None, reason[:200]))


def main() -> None:
    """Measure the items of a request from stdin, each in its share of the remaining time."""
    # All processes of one machine share the monotonic clock, so imports count as well.
    deadline = float(sys.argv[1])
    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    request = ProbeRequest(**json.load(sys.stdin))
    recipe = parse_recipe(request.recipe)
    num_items = len(list_titles(recipe))

    def report(measurement: Measurement) -> None:
        print(json.dumps(asdict(measurement)), file=stdout, flush=True)

    for number in range(num_items):
        left = deadline - time.monotonic()
        until = time.monotonic() + left / (num_items - number)
        measure_item(recipe, request, number, until, report)


if __name__ == "__main__":
    main()
