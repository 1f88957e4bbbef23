"""What each Ray Train worker does: load, go on from the last checkpoint, train, publish."""

import contextlib
import errno
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch

from rayfuse.layout import TrainRun
from rayfuse.model_files import load_recipe_tokenizer
from rayfuse.models import keeps_rows_apart, load_causal_lm, resolve_dtype
from rayfuse.recipe import Recipe, dump_recipe
from rayfuse.storage.dataset import DataSet, ShardError
from rayfuse.storage.object_store import StorageGoneError
from rayfuse.storage.store import Store
from rayfuse.train.checkpoint import Checkpoints, Record, name_checkpoint
from rayfuse.train.engine import FusionModel, build_engine, save_model
from rayfuse.train.feed import MicroBatch, Packing, Plan, build_micro_batches, iterate_steps
from rayfuse.train.loop import Objective, StepMetrics, measure_bits_per_byte, train_steps
from rayfuse.train.order import count_steps
from rayfuse.train.shards import ShardReader
from rayfuse.train.trackers import Trackers

FINAL_ERRORS = (ShardError, StorageGoneError, FloatingPointError, ValueError)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

TAG = "ds"

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


def run_worker(config: dict[str, Any]) -> None:
    """Train one worker's share of a run; a fault that is final is told to the board, too."""
    task: WorkerTask = config["task"]
    try:
        Trainer(task).train()
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

    def __post_init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.local_rank = context.get_local_rank()
        self.settings = self.task.recipe.train
        self.device = "cuda" if self.task.use_gpu else "cpu"
        self.checkpoints = Checkpoints(self.task.store, self.task.run.folder)
        self.trackers = Trackers(self.task.recipe, self.task.run, is_on=self.rank == 0)

    def train(self) -> None:
        """Train to the end and publish the model."""
        task, settings = self.task, self.settings
        reader = self._open_reader(task.corpus, task.aligned)
        num_steps = count_steps(sum(reader.rows_per_shard), settings.rows_per_step, settings.epochs)
        with self._fetch_checkpoint() as found:
            engine, packing = self._build(num_steps, len(reader.names), found)
            if found is not None:
                tag = "universal" if found.is_universal else TAG
                engine.load_checkpoint(str(found.folder), tag=tag)
                lines = (found.folder / "metrics.jsonl").read_text().splitlines()
                self.records = [json.loads(line) for line in lines]
                self.bits_per_byte = found.record.bits_per_byte
        validation = self._read_validation(packing)
        first_step = len(self.records)

        def after_step(metrics: StepMetrics) -> None:
            self._note(metrics, num_steps)
            is_end = metrics.step == num_steps
            if validation and (metrics.step % settings.validate_every_steps == 0 or is_end):
                self._validate(engine, validation, metrics.step, reader.token_bytes)
            is_due = metrics.step % settings.checkpoint_every_steps == 0
            if (is_due or self._is_preempted(engine)) and not is_end:
                self._save(engine, metrics.step)

        steps = iterate_steps(
            reader,
            packing,
            Plan(task.recipe.seed, settings.epochs, settings.rows_per_step),
            rank=self.rank,
            num_workers=self.num_workers,
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
            num_workers=self.num_workers,
            after_step=after_step,
            skipped_before=_count_last_skipped(self.records),
        )
        self.checkpoints.wait()
        with tempfile.TemporaryDirectory() as folder:
            save_model(engine, folder, rank=self.rank)
            if self.rank == 0:
                self._publish(Path(folder))
        self.trackers.close()

    def _open_reader(self, corpus: DataSet, aligned: dict[str, DataSet]) -> ShardReader:
        return ShardReader(corpus, aligned, self.task.recipe.fuse, self._token_bytes)

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        return load_recipe_tokenizer(self.task.recipe.target).count_bytes()

    def _build(
        self, num_steps: int, num_sources: int, found: "Found | None"
    ) -> tuple[Any, Packing]:
        """Return the engine, before any checkpoint is loaded, and how rows are laid out."""
        recipe, settings = self.task.recipe, self.settings
        target = recipe.target
        lm = load_causal_lm(
            target.model,
            dtype=resolve_dtype(target.dtype, self.device),
            device=self.device,
            revision=target.revision,
            trust_remote_code=target.trust_remote_code,
        )
        packing = Packing(
            sequence_tokens=settings.sequence_tokens or recipe.corpus.max_tokens,
            sequences=settings.micro_batch_sequences,
            is_packed=settings.pack and keeps_rows_apart(lm),
        )
        lm.model.train()
        engine = build_engine(
            FusionModel(lm, settings, num_sources=num_sources),
            settings,
            num_steps=num_steps,
            num_workers=self.num_workers,
            device=self.device,
            load_universal=found is not None and found.is_universal,
        )
        return engine, packing

    def _read_validation(self, packing: Packing) -> list[MicroBatch]:
        """Return this worker's micro-batches of the held-out rows that are measured."""
        count = self.settings.validation_rows
        if not count or not self.task.held_out.is_whole():
            return []
        reader = self._open_reader(self.task.held_out, {})
        rows = [
            (shard, row) for shard, num in enumerate(reader.rows_per_shard) for row in range(num)
        ]
        chosen = np.random.default_rng(0).permutation(np.array(rows).reshape(-1, 2))[:count]
        mine = np.array_split(chosen, self.num_workers)[self.rank]
        reader.keep(set(mine[:, 0].tolist()))
        return build_micro_batches(reader.read_rows(mine), packing)

    def _note(self, metrics: StepMetrics, num_steps: int) -> None:
        tokens_before = self.records[-1]["tokens"] if self.records else 0
        self.records.append(replace(metrics, tokens=tokens_before + metrics.tokens).to_record())
        if self.rank:
            return
        if metrics.is_skipped:
            self._tell(
                f"step {metrics.step} left the weights as they were: its loss or gradient is not "
                f"finite (rows {metrics.batch_id})"
            )
        loss = "not finite" if metrics.loss is None else f"{metrics.loss:.3f}"
        note = f"loss {loss}, {metrics.tokens_per_second:,.0f} tokens/s"
        if self.num_workers > 1:
            note += f" on {self.num_workers}"
        if metrics.wait_seconds > 0.1 * metrics.seconds:
            note += f", waits {metrics.wait_seconds / metrics.seconds:.0%} for data"
        if self.bits_per_byte is not None:
            note += f", held-out {self.bits_per_byte:.4f} bits a byte"
        self.task.board.write.remote(self.task.run.name, metrics.step, num_steps, note)
        self.trackers.log(self.records[-1])

    def _validate(
        self, engine: Any, batches: list[MicroBatch], step: int, token_bytes: np.ndarray
    ) -> None:
        self.bits_per_byte = measure_bits_per_byte(engine, batches, token_bytes)
        self.records[-1]["bits_per_byte"] = self.bits_per_byte
        if self.rank == 0:
            self.task.board.validate.remote(self.task.run.name, step, self.bits_per_byte)
            self.trackers.log({"step": step, "bits_per_byte": self.bits_per_byte})

    def _is_preempted(self, engine: Any) -> bool:
        """Return whether any worker's machine is about to be taken away."""
        told = torch.tensor(int(ray.train.get_preemption_info() is not None), device=engine.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return bool(told)

    def _save(self, engine: Any, step: int) -> None:
        """Save the engine and the metrics so far, and upload them meanwhile; all must call."""
        (attempt,) = _agree([uuid.uuid4().hex[:8]])
        name = name_checkpoint(step, attempt)
        local = tempfile.TemporaryDirectory()
        engine.save_checkpoint(local.name, tag=TAG, save_latest=False)
        if self.rank == 0:
            Path(local.name, "metrics.jsonl").write_text(_to_lines(self.records))
            self.checkpoints.begin(name)
            self._write_metrics()
        record = Record(name, step, self.num_workers, {}, self.bits_per_byte)
        self.checkpoints.upload(local, record, self.rank)
        if self.rank == 0:
            self.checkpoints.retain(self.settings.keep_checkpoints)

    @contextlib.contextmanager
    def _fetch_checkpoint(self) -> "Iterator[Found | None]":
        """Give the newest checkpoint that is whole and undamaged; each machine fetches it once."""
        whole = self.checkpoints.list_whole() if self.rank == 0 else {}
        cut_off = self.checkpoints.list_cut_off() if self.rank == 0 else []
        for records in reversed(_agree(list(whole.values()))):
            folder = Path(tempfile.gettempdir(), f"rayfuse-{records[0].name}-{self.num_workers}")
            found = Found(folder, records[0], records[0].num_workers != self.num_workers)
            is_good = self.local_rank != 0 or self._fetch(found, records)
            try:
                if all(_gather(is_good)):
                    self._tell_resumed(records[0], cut_off)
                    yield found
                    return
                self._tell(f"the checkpoint of step {records[0].step} is damaged, so not used")
            finally:
                _gather(None)  # until all have read it
                if self.local_rank == 0:
                    shutil.rmtree(folder, ignore_errors=True)
        yield None

    def _fetch(self, found: "Found", records: list[Record]) -> bool:
        shutil.rmtree(found.folder, ignore_errors=True)
        if not self.checkpoints.download(records, found.folder):
            return False
        if found.is_universal:
            convert_checkpoint(found.folder)
        return True

    def _tell_resumed(self, record: Record, cut_off: list[str]) -> None:
        later = [name for name in cut_off if name > record.name]
        lost = "; a later checkpoint was cut off" if later else ""
        was = (
            f" (of {record.num_workers} workers)" if record.num_workers != self.num_workers else ""
        )
        self._tell(f"goes on from the checkpoint of step {record.step}{was}{lost}")

    def _tell(self, text: str) -> None:
        if self.rank == 0:
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


@dataclass(frozen=True)
class Found:
    """A checkpoint on this machine."""

    folder: Path
    record: Record
    is_universal: bool
    """Written by another number of workers, and so converted to DeepSpeed's universal format."""


def convert_checkpoint(folder: Path) -> None:
    """Make DeepSpeed's universal format of a checkpoint, beside it, for any number of workers."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / TAG), "--output_folder", str(folder / "universal")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkpoint cannot be converted: {done.stderr[-2000:]}")


def _agree(value: list[Any]) -> list[Any]:
    """Return rank 0's list on every worker."""
    held = [value]
    torch.distributed.broadcast_object_list(held)
    return held[0]


def _gather(value: Any) -> list[Any]:
    """Return every worker's value."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _count_last_skipped(records: list[dict[str, Any]]) -> int:
    """Return how many steps in a row, up to the last, left the weights as they were."""
    taken = [number for number, record in enumerate(records, 1) if not record["is_skipped"]]
    return len(records) - max(taken, default=0)


def _to_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
