"""The demo stage: text, four tiny models, and the recipe that fuses them."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import torch

import rayfuse
from rayfuse.demo import shipped
from rayfuse.demo.recipe_text import render_recipe
from rayfuse.demo.specs import SOURCES, TARGET, ModelSpec
from rayfuse.demo.text import SIZES, Document, collect_domains, split_documents, write_documents
from rayfuse.demo.tiny_models import pretrain
from rayfuse.run.fingerprint import fingerprint_of
from rayfuse.runtime.progress import Progress, ProgressEvent
from rayfuse.train.monitor import RunState, RunStatus

CORPUS_BYTES, HELD_OUT_BYTES = 40_000, 60_000
"""Text of each domain that the shipped models are fused on, and evaluated on: little, so that the
demo ends soon."""

POLL_SECONDS = 0.5
STEPS_BETWEEN_REPORTS = 10


def prepare_demo(
    storage: str,
    seed: int,
    progress: Progress,
    specs: Sequence[ModelSpec] = (*SOURCES, TARGET),
    *,
    train_models: bool = False,
) -> Path:
    """Create documents and models below `storage`/demo, and write the recipe that fuses them.

    Args:
        storage: A local folder.
        seed: Seed of the text's split and, in the recipe, of the training.
        progress: Receives the steps of every model.
        specs: The sources, and last the target.
        train_models: Train the models from scratch, in Ray tasks, by the same seed; Ray must be
            initialised. Models that exist already, by the same spec, text and seed, are reused. By
            default the shipped models are copied, and their text is in neither part.

    Raises:
        UserError: This Python lacks the sources of the standard library, or rayfuse the models.
    """
    root = Path(storage).absolute()
    folder = root / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    progress(ProgressEvent("demo", "text", 0, 1))
    if train_models:
        parts = split_documents(collect_domains(seed), seed)
    else:
        sizes = {
            domain: replace(size, corpus=CORPUS_BYTES, held_out=HELD_OUT_BYTES, pretrain=0)
            for domain, size in SIZES.items()
        }
        domains = collect_domains(shipped.SEED, shipped.read_seen_text())
        parts = split_documents(domains, seed, sizes)
    write_documents(parts.corpus, folder / "corpus.jsonl")
    write_documents(parts.held_out, folder / "held_out.jsonl")
    progress(ProgressEvent("demo", "text", 1, 1))
    if train_models:
        _pretrain_all(specs, parts.pretrain, folder, seed, progress)
    else:
        shipped.copy_models([spec.name for spec in specs], folder)
    recipe = root / "recipe.yaml"
    recipe.write_text(render_recipe(root, seed, specs), encoding="utf-8")
    return recipe


def _pretrain_all(
    specs: Sequence[ModelSpec],
    documents: tuple[Document, ...],
    folder: Path,
    seed: int,
    progress: Progress,
) -> None:
    """Train the missing models, one per CPU at a time, and report their steps."""
    text_hash = _hash_documents(documents)
    fingerprints = {
        spec.name: fingerprint_of(
            spec=asdict(spec), seed=seed, text=text_hash, version=rayfuse.__version__
        )
        for spec in specs
    }
    todo = [spec for spec in specs if not _is_done(folder / spec.name, fingerprints[spec.name])]
    if not todo:
        return
    status: Any = ray.remote(num_cpus=0)(RunStatus).remote()
    stored = ray.put(documents)
    train: Any = ray.remote(num_cpus=_cpus_per_task(), max_retries=0)(_pretrain)
    pending = [
        train.remote(spec, stored, folder / spec.name, seed, fingerprints[spec.name], status)
        for spec in todo
    ]
    while pending:
        ready, pending = ray.wait(pending, timeout=POLL_SECONDS)
        ray.get(ready)
        states: dict[str, RunState] = ray.get(status.read.remote())
        for name, state in states.items():
            progress(
                ProgressEvent("demo", f"pretrain {name}", state.step, state.num_steps, "steps")
            )


def _cpus_per_task() -> int:
    """Count Ray's CPUs per real CPU: Ray may have been started with more than this machine has."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // (os.cpu_count() or 1))


def _pretrain(
    spec: ModelSpec,
    documents: tuple[Document, ...],
    folder: Path,
    seed: int,
    fingerprint: str,
    status: Any,
) -> None:
    """Train one model on one thread; `done.json` is written last."""
    torch.set_num_threads(1)

    def on_step(step: int, num_steps: int, loss: float) -> None:
        if step % STEPS_BETWEEN_REPORTS == 0 or step == num_steps:
            status.record_step.remote(spec.name, step, num_steps)

    (folder / "done.json").unlink(missing_ok=True)
    pretrain(spec, documents, folder, seed=seed, on_step=on_step)
    ray.get(status.record_step.remote(spec.name, spec.steps, spec.steps))
    (folder / "done.json").write_text(json.dumps({"fingerprint": fingerprint}))


def _is_done(folder: Path, fingerprint: str) -> bool:
    try:
        return json.loads((folder / "done.json").read_bytes())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError):  # missing, or incomplete after a kill
        return False


def _hash_documents(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.doc_id}\0{document.text}\0".encode())
    return digest.hexdigest()
