"""How fast models really are, measured in seconds; a process of its own when run as a module.

That process reads a `Request` from stdin and writes a line of JSON for each better figure, so that
whoever ends it loses nothing.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rayfuse.config.load import parse_recipe
from rayfuse.config.models import SourceSettings
from rayfuse.config.recipe import Recipe

ENOUGH_SECONDS = 2.0
"""A measurement that took so long is good enough."""

PROBED_TRAINING = "train fused"


@dataclass(frozen=True)
class Request:
    """What is to be measured, and on what."""

    recipe: dict[str, Any]
    texts: list[str]
    ends_document: list[bool]
    seconds: float


@dataclass(frozen=True)
class Measured:
    """How fast one piece of work was on one device."""

    title: str
    """As in the plan."""
    device: str
    tokens_per_second: float | None
    """Of one GPU, where it has more. None where it was not measured."""
    note: str = ""
    """Why not."""


Tell = Callable[[Measured], None]


def measure_rate(run: Callable[[int], int], deadline: float) -> Iterator[float]:
    """Yield better and better rates, each of twice the work of the one before.

    Args:
        run: Does so many units of work, and returns their tokens.
        deadline: On the monotonic clock; what would last longer is not begun.
    """
    units = 1
    while True:
        began = time.monotonic()
        tokens = run(units)
        took = time.monotonic() - began
        yield tokens / max(took, 1e-9)
        # Twice as much takes less than twice as long; the first one warms up.
        if time.monotonic() + 2 * took > deadline or (took > ENOUGH_SECONDS and units > 1):
            return
        units *= 2


def probe_source(
    recipe: Recipe, source: SourceSettings, request: Request, deadline: float
) -> Iterator[Measured]:
    """Yield how fast a source scores rows for each of its GPUs, with the engine that captures."""
    from rayfuse.capture.engines.load import load_recipe_engine
    from rayfuse.models.files import load_recipe_tokenizer

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
        yield Measured(f"capture {source.name}", name_device(), rate / max(source.gpus or 1.0, 1.0))


def probe_training(recipe: Recipe, request: Request, deadline: float) -> Iterator[Measured]:
    """Yield how fast one worker takes fused steps; what the distributions are does not matter."""
    import torch

    from rayfuse.models.causal_lm import keeps_rows_apart, load_causal_lm
    from rayfuse.models.files import load_recipe_tokenizer
    from rayfuse.train.batches import Packing, Step, build_micro_batches
    from rayfuse.train.deepspeed_engine import build_engine
    from rayfuse.train.loop import Objective, train_steps
    from rayfuse.train.model import FusionModel

    target, settings = recipe.target, recipe.train
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _group_of_one(device):
        lm = load_causal_lm(target, device)
        packing = Packing(
            settings.sequence_tokens or recipe.corpus.max_tokens,
            settings.micro_batch_sequences,
            settings.pack and keeps_rows_apart(lm),
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
            yield Measured(PROBED_TRAINING, name_device(), rate)


def _make_rows(ids: list[np.ndarray], vocab: int, entries: int) -> Any:
    """Return rows whose positions all have a distribution, a random one."""
    from rayfuse.fuse.reader import FusedRows
    from rayfuse.storage.codec import TopK

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
    """Be a process group alone."""
    import torch

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
    """Return what models run on in this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def list_probes(
    recipe: Recipe, request: Request
) -> list[tuple[str, Callable[[float], Iterator[Measured]]]]:
    """Return each piece of work that can be measured, and what measures it until a deadline."""
    probes: list[tuple[str, Callable[[float], Iterator[Measured]]]] = []
    for source in recipe.sources:

        def probe(deadline: float, source: SourceSettings = source) -> Iterator[Measured]:
            return probe_source(recipe, source, request, deadline)

        probes.append((f"capture {source.name}", probe))
    probes.append((PROBED_TRAINING, lambda deadline: probe_training(recipe, request, deadline)))
    return probes


def run_probe(
    title: str, probe: Callable[[float], Iterator[Measured]], deadline: float, tell: Tell
) -> None:
    """Measure one piece of work, and tell each better figure; what is wrong is told as well."""
    try:
        for measured in probe(deadline):
            tell(measured)
    except (ValueError, RuntimeError, MemoryError, OSError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        tell(Measured(title, name_device(), None, reason[:200]))


def main() -> None:
    """Measure what stdin asks for, one thing after the other, each in its share of the time."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    request = Request(**json.load(sys.stdin))
    deadline = time.monotonic() + request.seconds
    recipe = parse_recipe(request.recipe)
    probes = list_probes(recipe, request)

    def tell(measured: Measured) -> None:
        print(json.dumps(asdict(measured)), file=stdout, flush=True)

    for number, (title, probe) in enumerate(probes):
        left = deadline - time.monotonic()
        until = time.monotonic() + left / (len(probes) - number)
        run_probe(title, probe, until, tell)


if __name__ == "__main__":
    main()
