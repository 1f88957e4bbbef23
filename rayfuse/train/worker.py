"""What each Ray Train worker does: load, go on from the last checkpoint, train, publish."""

import errno
import json
import logging
import tempfile
import time
import uuid
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch

from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.fuse.reader import ShardReader
from rayfuse.models.causal_lm import (
    is_out_of_memory,
    keeps_rows_apart,
    load_causal_lm,
)
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.run.layout import TrainRun
from rayfuse.runtime.metrics import count_work
from rayfuse.storage.dataset import DataSet, ShardError
from rayfuse.storage.object_store import StorageUnavailableError
from rayfuse.storage.store import Store
from rayfuse.train.batches import MicroBatch, Packing, Plan, build_micro_batches, iterate_steps
from rayfuse.train.checkpoint import Checkpoints, Record, name_checkpoint
from rayfuse.train.loop import Objective, StepMetrics, measure_bits_per_byte, train_steps
from rayfuse.train.model import FusionModel, build_engine, save_model
from rayfuse.train.monitor import RunState
from rayfuse.train.order import count_steps, draw_rows
from rayfuse.train.process_group import Peers
from rayfuse.train.resume import TAG, fetch_newest
from rayfuse.train.trackers import Trackers

FINAL_ERRORS = (ShardError, StorageUnavailableError, FloatingPointError, ValueError)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker needs to train its share of a run."""

    recipe: Recipe
    run: TrainRun
    store: Store
    corpus: DataSet
    aligned: dict[str, DataSet]
    """Empty for the run without fusion."""
    held_out: DataSet
    use_gpu: bool
    board: Any
    """The actor that hears of steps."""
    job: str
    """An id of this call of `train_runs`, by which local folders are told apart."""


def run_worker(config: dict[str, Any]) -> None:
    """Train one worker's share of a run; a fault that is final is told to the board, too."""
    task: WorkerTask = config["task"]
    task.board.begin.remote(task.run.name)
    try:
        trainer = Trainer(task)
        try:
            trainer.train()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                trainer.halve_micro_batches()
            raise
    except Exception as error:
        if _is_final(error):
            ray.get(task.board.fail.remote(task.run.name, error))
        raise


def _is_final(error: Exception) -> bool:
    """Return whether trying again would not mend it."""
    is_full = isinstance(error, OSError) and error.errno in FULL_DISK
    return is_full or isinstance(error, FINAL_ERRORS)


@dataclass
class Trainer:
    """One worker's share of a run."""

    task: WorkerTask
    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """metrics.jsonl so far."""
    bits_per_byte: float | None = None
    """On validation, where it was measured last."""
    is_on_notice: bool = False
    """A worker's machine is about to be taken away, and a checkpoint was made."""

    def __post_init__(self) -> None:
        task, context = self.task, ray.train.get_context()
        self.settings = task.recipe.train
        self.device = "cuda" if task.use_gpu else "cpu"
        self.peers = Peers(
            rank=context.get_world_rank(),
            num_workers=context.get_world_size(),
            local_rank=context.get_local_rank(),
            scratch=Path(tempfile.gettempdir(), f"rayfuse-{task.run.fingerprint}-{task.job}"),
        )
        self.peers.renew_scratch()
        self.checkpoints = Checkpoints(task.store, task.run.folder)
        self.trackers = Trackers(task.recipe, task.run, is_on=self.peers.is_rank_zero)
        states: dict[str, RunState] = ray.get(task.board.read.remote())
        limit = states.get(task.run.name, RunState()).max_sequences
        self.sequences: int = self.peers.broadcast(limit or self.settings.micro_batch_sequences)

    def halve_micro_batches(self) -> None:
        """Let the next attempt have micro-batches of half as many sequences.

        Raises:
            ValueError: They have one.
        """
        if self.sequences == 1:
            raise ValueError(
                "out of memory with micro-batches of one sequence; lower train.sequence_tokens or "
                "corpus.max_tokens, or set train.gradient_checkpointing, train.offload, "
                "train.zero_stage=3 or more train.num_workers"
            )
        half = self.sequences // 2
        ray.get(self.task.board.limit.remote(self.task.run.name, half))
        text = (
            f"out of memory with {self.sequences} sequences a micro-batch; tried again with {half}"
        )
        ray.get(self.task.board.tell.remote(self.task.run.name, text))

    def train(self) -> None:
        """Train to the end and publish the model."""
        task, settings = self.task, self.settings
        reader = self._open_reader(task.corpus, task.aligned)
        num_steps = count_steps(sum(reader.rows_per_shard), settings.rows_per_step, settings.epochs)
        with fetch_newest(self.checkpoints, self.peers, self._tell) as found:
            is_universal = found is not None and found.is_universal
            engine, packing = self._build(num_steps, len(reader.names), is_universal)
            if found is not None:
                found.load(engine)
                self.records = found.read_metrics()
                self.bits_per_byte = found.record.bits_per_byte
        validation = self._read_validation(packing)
        first_step = len(self.records)

        def after_step(metrics: StepMetrics) -> None:
            self._note(metrics, num_steps)
            is_end = metrics.step == num_steps
            if validation and (metrics.step % settings.validate_every_steps == 0 or is_end):
                self._validate(engine, validation, metrics.step, reader.token_bytes)
            is_due = metrics.step % settings.checkpoint_every_steps == 0
            if (self._is_first_notice() or is_due) and not is_end:
                self._save(engine, metrics.step)

        steps = iterate_steps(
            reader,
            packing,
            Plan(task.recipe.seed, settings.epochs, settings.rows_per_step),
            rank=self.peers.rank,
            num_workers=self.peers.num_workers,
            first_step=first_step,
        )
        objective = Objective(
            clm_weight=settings.clm_weight if task.run.is_fused else 1.0,
            temperature=settings.temperature,
            num_steps=num_steps,
            source_names=reader.names,
        )
        train_steps(
            engine,
            steps,
            objective,
            first_step=first_step,
            num_workers=self.peers.num_workers,
            after_step=after_step,
            skipped_before=_count_last_skipped(self.records),
            seed=task.recipe.seed,
        )
        self.checkpoints.wait()
        with tempfile.TemporaryDirectory(dir=self.peers.scratch) as folder:
            save_model(engine, folder, rank=self.peers.rank)
            if self.peers.is_rank_zero:
                self._publish(Path(folder))
        self.peers.remove(self.peers.scratch)
        self.trackers.close()

    def _open_reader(self, corpus: DataSet, aligned: dict[str, DataSet]) -> ShardReader:
        return ShardReader(corpus, aligned, self.task.recipe.fuse, self._token_bytes)

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        return load_recipe_tokenizer(self.task.recipe.target).count_bytes()

    def _build(self, num_steps: int, num_sources: int, is_universal: bool) -> tuple[Any, Packing]:
        """Return the engine, before any checkpoint is loaded, and how rows are laid out."""
        recipe, settings = self.task.recipe, self.settings
        lm = load_causal_lm(recipe.target, self.device)
        packing = Packing(
            sequence_tokens=settings.sequence_tokens or recipe.corpus.max_tokens,
            sequences=self.sequences,
            is_packed=settings.pack and keeps_rows_apart(lm),
        )
        lm.model.train()
        torch.manual_seed(recipe.seed)  # adapters begin at random
        engine = build_engine(
            FusionModel(lm, settings, num_sources=num_sources),
            settings,
            num_steps=num_steps,
            num_workers=self.peers.num_workers,
            device=self.device,
            load_universal=is_universal,
        )
        return engine, packing

    def _read_validation(self, packing: Packing) -> list[MicroBatch]:
        """Return this worker's micro-batches of the held-out rows that are measured."""
        count = self.settings.validation_rows
        if not count or not self.task.held_out.is_complete():
            return []
        reader = self._open_reader(self.task.held_out, {})
        chosen = draw_rows(reader.rows_per_shard, count, seed=0)
        mine = np.array_split(chosen, self.peers.num_workers)[self.peers.rank]
        reader.keep(set(mine[:, 0].tolist()))
        rows = reader.read_rows(mine)
        reader.keep(set())
        return build_micro_batches(rows, packing)

    def _note(self, metrics: StepMetrics, num_steps: int) -> None:
        tokens_before = self.records[-1]["tokens"] if self.records else 0
        self.records.append(replace(metrics, tokens=tokens_before + metrics.tokens).to_record())
        if not self.peers.is_rank_zero:
            return
        if metrics.is_skipped:
            self._tell(
                f"step {metrics.step} left the weights as they were: its loss or gradient is not "
                f"finite (rows {metrics.batch_id})"
            )
        loss = "not finite" if metrics.loss is None else f"{metrics.loss:.3f}"
        note = f"loss {loss}, {metrics.tokens_per_second:,.0f} tokens/s"
        if self.peers.num_workers > 1:
            note += f" on {self.peers.num_workers}"
        if metrics.wait_seconds > 0.1 * metrics.seconds:
            note += f", waits {metrics.wait_seconds / metrics.seconds:.0%} for data"
        if self.bits_per_byte is not None:
            note += f", held-out {self.bits_per_byte:.4f} bits a byte"
        self.task.board.write.remote(self.task.run.name, metrics.step, num_steps, note)
        self.trackers.log(self.records[-1])
        count_work("train", self.task.run.name, tokens=metrics.tokens, seconds=metrics.seconds)

    def _validate(
        self, engine: Any, batches: list[MicroBatch], step: int, token_bytes: np.ndarray
    ) -> None:
        self.bits_per_byte = measure_bits_per_byte(engine, batches, token_bytes)
        self.records[-1]["bits_per_byte"] = self.bits_per_byte
        if self.peers.is_rank_zero:
            self.task.board.validate.remote(self.task.run.name, step, self.bits_per_byte)
            self.trackers.log({"step": step, "bits_per_byte": self.bits_per_byte})

    def _is_first_notice(self) -> bool:
        """Return whether it is new that a worker's machine is about to be taken away; all
        broadcast."""
        if self.is_on_notice or ray.train.get_preemption_info() is None:
            return False
        self.is_on_notice = True
        self._tell("a machine is about to be taken away: a checkpoint is made")
        return True

    def _save(self, engine: Any, step: int) -> None:
        """Save the engine and the metrics so far, and upload them meanwhile; all must call."""
        attempt = self.peers.broadcast(uuid.uuid4().hex[:8])
        name = name_checkpoint(step, attempt)
        local = tempfile.TemporaryDirectory(dir=self.peers.scratch)
        engine.save_checkpoint(local.name, tag=TAG, save_latest=False)
        if self.peers.is_rank_zero:
            Path(local.name, "metrics.jsonl").write_text(_to_lines(self.records))
            self.checkpoints.begin(name)
            self._write_metrics()
        record = Record(name, step, self.peers.num_workers, {}, self.bits_per_byte)
        self.checkpoints.upload(local, record, self.peers.rank)
        if self.peers.is_rank_zero:
            self.checkpoints.retain(self.settings.keep_checkpoints)

    def _tell(self, text: str) -> None:
        if self.peers.is_rank_zero:
            self.task.board.tell.remote(self.task.run.name, text)

    def _publish(self, folder: Path) -> None:
        """Put the model, its tokenizer and the metrics into the store; `done.json` comes last."""
        from transformers import AutoTokenizer

        task = self.task
        target = task.recipe.target
        tokenizer = AutoTokenizer.from_pretrained(
            target.model, revision=target.revision, trust_remote_code=target.trust_remote_code
        )
        tokenizer.save_pretrained(folder)
        for file in sorted(folder.iterdir()):
            task.store.upload(str(file), f"{task.run.folder}/model/{file.name}")
        self._write_metrics()
        done = {
            "fingerprint": task.run.fingerprint,
            "finished": time.time(),
            "recipe": dump_recipe(task.recipe),
            "steps": len(self.records),
        }
        task.store.write(f"{task.run.folder}/done.json", json.dumps(done, indent=1).encode())

    def _write_metrics(self) -> None:
        lines = _to_lines(self.records).encode()
        self.task.store.write(f"{self.task.run.folder}/metrics.jsonl", lines)
        self.trackers.upload(self.task.store)


def _count_last_skipped(records: list[dict[str, Any]]) -> int:
    """Return how many steps in a row, up to the last, left the weights as they were."""
    taken = [number for number, record in enumerate(records, 1) if not record["is_skipped"]]
    return len(records) - max(taken, default=0)


def _to_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
