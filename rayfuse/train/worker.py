"""What each Ray Train worker does: load, resume from the newest checkpoint, train, publish."""

import tempfile
import time
import uuid
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch

from rayfuse.config.base import UserError
from rayfuse.config.recipe import dump_recipe
from rayfuse.fuse.reader import ShardReader
from rayfuse.models.attention import prepare_packing
from rayfuse.models.causal_lm import load_causal_lm
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.folder import copy_tokenizer, list_files
from rayfuse.models.out_of_memory import is_out_of_memory
from rayfuse.run.made_models import DONE_FILE
from rayfuse.runtime.connect import is_disk_full
from rayfuse.runtime.logging import log_event
from rayfuse.runtime.scratch import name_scratch
from rayfuse.runtime.worker_setup import return_to_folder
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import hash_bytes, upload_files, write_record
from rayfuse.storage.retry import StorageUnavailableError
from rayfuse.storage.seal import ShardError
from rayfuse.train.batches import (
    MicroBatch,
    Packing,
    StepPlan,
    build_micro_batches,
    iterate_steps,
)
from rayfuse.train.checkpoint import CheckpointRecord, Checkpoints, name_checkpoint
from rayfuse.train.deepspeed_engine import build_engine, save_model
from rayfuse.train.loop import Objective, StepMetrics, measure_bits_per_byte, train_steps
from rayfuse.train.model import FusionModel
from rayfuse.train.order import advise_steps, count_steps
from rayfuse.train.process_group import ProcessGroup
from rayfuse.train.recorder import MetricsRecorder
from rayfuse.train.resume import TAG, fetch_newest
from rayfuse.train.task import WorkerTask
from rayfuse.train.trackers import Trackers
from rayfuse.train.validation import choose_validation_rows

NON_RETRYABLE_ERRORS = (ShardError, StorageUnavailableError, FloatingPointError, ValueError)


def run_worker(config: dict[str, Any]) -> None:
    """Train one worker's share of a run, and record an error that a retry would not fix.

    Args:
        config: The `WorkerTask` as `task`, as Ray Train passes it.
    """
    return_to_folder()  # relative paths of the recipe are meant there
    task: WorkerTask = config["task"]
    task.status.start.remote(task.run.name)
    try:
        trainer = Trainer(task, join_group(task))
        trainer.open()
        try:
            trainer.train()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                trainer.halve_micro_batches()
            raise
        # Not in a `finally`: close() waits for all workers, and those of a failed attempt may
        # never come. The next attempt clears the scratch folder and continues the trackers' runs.
        trainer.close()
    except (OSError, *NON_RETRYABLE_ERRORS) as error:
        if _is_non_retryable(error):
            # Ray Train retries every exception, so the driver cancels the run for this one. It
            # must be recorded before the worker ends, so this call is waited for.
            ray.get(task.control.set_error.remote(task.run.name, error))
        raise


def join_group(task: WorkerTask) -> ProcessGroup:
    """Return this worker's place among the workers that Ray Train has started."""
    context = ray.train.get_context()
    return ProcessGroup(
        rank=context.get_world_rank(),
        num_workers=context.get_world_size(),
        local_rank=context.get_local_rank(),
        scratch=name_scratch(f"{task.run.fingerprint}-{task.job}"),
    )


def _is_non_retryable(error: Exception) -> bool:
    """Decide whether a retry would raise the same error."""
    return is_disk_full(error) or isinstance(error, NON_RETRYABLE_ERRORS)


class Trainer:
    """Trains one worker's share of a run: `open`, `train`, and after success `close`."""

    def __init__(self, task: WorkerTask, group: ProcessGroup) -> None:
        self.task, self.group = task, group
        self.settings = task.recipe.train.for_run(is_fused=task.run.is_fused)
        self.device = "cuda" if task.use_gpu else "cpu"
        self.sequences = self.settings.micro_batch_sequences
        self.is_preempted = self.is_stopped = False
        self.checkpoints = Checkpoints(task.store, task.run.folder)
        self.trackers = Trackers(task.recipe, task.run, is_on=group.is_rank_zero)
        self.recorder = MetricsRecorder(task.run, task.store, task.status, self.trackers, group)

    def open(self) -> None:
        """Prepare the node's scratch folder, the trackers and the micro-batch size."""
        self.group.reset_scratch()
        self.trackers.open()
        accelerators = ray.get_runtime_context().get_accelerator_ids()
        self.recorder.publish_workers(accelerators.get("GPU", []))
        limit = ray.get(self.task.control.read_max_sequences.remote(self.task.run.name))
        # Rank 0 decides: another worker may already have read a newer limit.
        self.sequences = self.group.broadcast(limit or self.sequences)

    def close(self) -> None:
        """Remove the scratch folder and finish the trackers; all workers must call."""
        self.group.remove_folder(self.group.scratch)
        self.trackers.close()

    def halve_micro_batches(self) -> None:
        """Let the next attempt run with half as many sequences per micro-batch.

        Raises:
            UserError: A micro-batch is one sequence already.
        """
        if self.sequences == 1:
            raise UserError(
                "out of memory with micro-batches of one sequence; lower train.sequence_tokens or "
                "corpus.max_tokens, or set train.gradient_checkpointing, train.offload, "
                "train.zero_stage=3 or more train.num_workers"
            )
        half, name = self.sequences // 2, self.task.run.name
        ray.get(self.task.control.set_max_sequences.remote(name, half))
        message = (
            f"out of memory with {self.sequences} sequences per micro-batch; retrying with {half}"
        )
        ray.get(self.task.status.log.remote(name, message))

    def train(self) -> None:
        """Train from the newest usable checkpoint to the last step, and publish the model."""
        task, settings = self.task, self.settings
        reader = self._open_reader(task.corpus, task.aligned)
        num_steps = count_steps(sum(reader.rows_per_shard), settings.rows_per_step, settings.epochs)
        engine, packing = self._restore_engine(num_steps, reader)
        advice = advise_steps(
            sum(reader.rows_per_shard),
            settings.rows_per_step,
            settings.epochs,
            least=self.group.num_workers,
        )
        if advice is not None and task.run.name == "fused":  # the baseline has the same steps
            self.recorder.log(advice)
        validation = self._read_validation(packing)
        first_step = len(self.recorder.records)
        steps = iterate_steps(
            reader,
            packing,
            StepPlan(task.recipe.seed, settings.epochs, settings.rows_per_step),
            rank=self.group.rank,
            num_workers=self.group.num_workers,
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
            takewhile(lambda _: not (self._is_finished or self.is_stopped), steps),
            objective,
            first_step=first_step,
            num_workers=self.group.num_workers,
            after_step=lambda metrics: self._after_step(engine, validation, metrics, num_steps),
            skipped_before=self.recorder.num_skipped,
            seed=task.recipe.seed,
        )
        self.checkpoints.wait()
        if self.is_stopped:  # at the checkpoint from which the next start resumes
            return
        best = self._find_published_step()
        if best != len(self.recorder.records):
            del engine  # or two would be in memory
            engine = self._load_engine(best, num_steps, reader)
        self._publish(engine)

    def _after_step(
        self,
        engine: Any,
        validation: list[MicroBatch] | None,
        metrics: StepMetrics,
        num_steps: int,
    ) -> None:
        """Record a step, and validate and save a checkpoint where they are due."""
        self.recorder.record_step(metrics, num_steps)
        step, is_last = metrics.step, metrics.step == num_steps
        if validation is not None and (step % self.settings.validate_every_steps == 0 or is_last):
            bits = measure_bits_per_byte(engine, validation, self._token_bytes)
            self.recorder.record_validation(step, bits)
        is_due = step % self.settings.checkpoint_every_steps == 0
        is_due |= self._keeps_best and step == self.recorder.best_step
        is_due |= not is_last and self._is_stop_requested()
        if (self._is_newly_preempted() or is_due) and not is_last:
            self._save(engine, step)

    @property
    def _keeps_best(self) -> bool:
        return self.settings.publish == "best"

    @property
    def _is_finished(self) -> bool:
        """Whether training ends before the last step: the same on all workers, and after resume."""
        patience = self.settings.patience
        return patience is not None and self.recorder.count_since_best() >= patience

    def _load_engine(self, step: int, num_steps: int, reader: ShardReader) -> Any:
        """Build an engine with the weights of a checkpoint; all workers must call.

        Raises:
            UserError: The checkpoint is corrupt or gone.
        """
        self.group.barrier()  # until every worker's part is uploaded
        with fetch_newest(self.checkpoints, self.group, self.recorder.log, step=step) as found:
            if found is None:
                raise UserError(
                    f"the best checkpoint, of step {step}, is missing or corrupt; remove "
                    f"{self.task.run.folder} to train again, or set train.publish: last"
                )
            engine, _ = self._build(num_steps, reader, found.is_universal)
            found.load(engine)
        return engine

    def _open_reader(self, corpus: DataSet, aligned: dict[str, DataSet]) -> ShardReader:
        # What is measured are answers, whatever is learned.
        learns_context = self.settings.loss_on == "all" and corpus is self.task.corpus
        fuse, sizes = self.task.recipe.fuse, self._token_bytes
        return ShardReader(corpus, aligned, fuse, sizes, learns_context=learns_context)

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        return load_recipe_tokenizer(self.task.recipe.target).count_bytes()

    def _restore_engine(self, num_steps: int, reader: ShardReader) -> tuple[Any, Packing]:
        """Build the engine, and load the newest usable checkpoint into it if there is one."""
        with fetch_newest(self.checkpoints, self.group, self.recorder.log) as found:
            is_universal = found is not None and found.is_universal
            engine, packing = self._build(num_steps, reader, is_universal)
            if found is not None:
                found.load(engine)
                self.recorder.restore(found.read_metrics(), found.record.bits_per_byte)
        return engine, packing

    def _build(
        self, num_steps: int, reader: ShardReader, is_universal: bool
    ) -> tuple[Any, Packing]:
        """Build the engine with the target's original weights, and choose how rows are packed."""
        recipe, settings = self.task.recipe, self.settings
        loaded = load_causal_lm(recipe.target, self.device)
        lm, is_packed = prepare_packing(loaded, pack=settings.pack)
        attention = getattr(loaded.model.config, "_attn_implementation", None)
        log_event("attention", run=self.task.run.name, code=attention, rows_packed=is_packed)
        packing = Packing(
            sequence_tokens=settings.sequence_tokens or recipe.corpus.max_tokens,
            sequences=self.sequences,
            is_packed=is_packed,
            boundaries=lm.length_boundaries,
        )
        lm.model.train()
        torch.manual_seed(recipe.seed)  # LoRA adapters are initialised at random
        engine = build_engine(
            FusionModel(lm, settings, num_sources=len(reader.names)),
            settings,
            num_steps=num_steps,
            num_workers=self.group.num_workers,
            device=self.device,
            load_universal=is_universal,
        )
        return engine, packing

    def _read_validation(self, packing: Packing) -> list[MicroBatch] | None:
        """Read this worker's micro-batches of the held-out rows; None if no worker validates.

        Raises:
            UserError: `publish: best` has no held-out rows to choose by.
        """
        if not self.settings.validation_rows or not self.task.held_out.is_complete():
            if self._keeps_best:
                raise UserError(
                    "there are no held-out rows for train.publish: best; split the corpus"
                )
            return None
        reader = self._open_reader(self.task.held_out, {})
        chosen = choose_validation_rows(self.task.held_out, self.settings)
        if not len(chosen):
            return None
        share = np.array_split(chosen, self.group.num_workers)[self.group.rank]
        reader.keep(set(share[:, 0].tolist()))
        rows = reader.read_rows(share)
        reader.keep(set())
        return build_micro_batches(rows, packing)

    def _is_stop_requested(self) -> bool:
        """Check whether the run is to stop; all workers get the same answer."""
        if not self.task.can_stop:
            return False
        is_requested = self.group.is_rank_zero and ray.get(self.task.control.has_stopped.remote())
        self.is_stopped = self.group.broadcast(is_requested)
        if self.is_stopped:
            self.recorder.log("stopping as requested: saving a checkpoint")
        return self.is_stopped

    def _is_newly_preempted(self) -> bool:
        """Report, once, that a node is about to be preempted; all workers get the same answer."""
        if self.is_preempted or ray.train.get_preemption_info() is None:
            return False
        self.is_preempted = True
        self.recorder.log("a node is about to be preempted: saving a checkpoint")
        return True

    def _save(self, engine: Any, step: int) -> None:
        """Save a checkpoint, and upload it in the background; all workers must call."""
        # The attempt's id keeps the files of two attempts at one step apart: a checkpoint is never
        # a mixture of them.
        attempt = self.group.broadcast(uuid.uuid4().hex[:8])
        name = name_checkpoint(step, attempt)
        local = tempfile.TemporaryDirectory(dir=self.group.scratch)
        engine.save_checkpoint(local.name, tag=TAG, save_latest=False)
        if self.group.is_rank_zero:
            Path(local.name, "metrics.jsonl").write_text(self.recorder.to_lines())
            self.checkpoints.mark_started(name)
            self.recorder.upload()
        record = CheckpointRecord(
            name,
            step,
            self.group.num_workers,
            self.group.rank,
            {},
            self.recorder.bits_per_byte,
            self.task.inputs,
        )
        self.checkpoints.upload(local, record)
        if self.group.is_rank_zero:
            self.checkpoints.retain(self.settings.keep_checkpoints, self.recorder.best_step)

    def _publish(self, engine: Any) -> None:
        """Write the trained model to the store; all workers must call."""
        with tempfile.TemporaryDirectory(dir=self.group.scratch) as folder:
            save_model(engine, folder, rank=self.group.rank)
            if self.group.is_rank_zero:
                self._upload_model(Path(folder))

    def _find_published_step(self) -> int:
        best = self.recorder.best_step
        return best if self._keeps_best and best is not None else len(self.recorder.records)

    def _upload_model(self, folder: Path) -> None:
        """Upload the model, its tokenizer and the metrics; `done.json` commits them, so it is last.

        Args:
            folder: Holds the model; the target's tokenizer files are added to it, unchanged.
        """
        task = self.task
        copy_tokenizer(task.recipe.target, folder)
        paths = {
            f"model/{file.relative_to(folder).as_posix()}": file
            for file in list_files(folder, ("**/*",))
        }
        files = upload_files(task.store, task.run.folder, paths)
        metrics = self.recorder.upload()
        done = {
            "fingerprint": task.run.fingerprint,
            "finished": time.time(),
            "inputs": task.inputs,
            "recipe": dump_recipe(task.recipe),
            "steps": len(self.recorder.records),
            "published_step": self._find_published_step(),
        }
        files["metrics.jsonl"] = hash_bytes(metrics)
        write_record(task.store, f"{task.run.folder}/{DONE_FILE}", done, files)
