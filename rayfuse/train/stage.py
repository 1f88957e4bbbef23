"""The train stage: Ray Train workers around a DeepSpeed engine, with and without fusion at once."""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from rayfuse.layout import Layout, TrainRun
from rayfuse.progress import Board, Progress
from rayfuse.recipe import Recipe, dump_recipe
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import Store

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker needs to train its share of a run."""

    recipe: Recipe
    run: TrainRun
    store: Store
    corpus: DataSet
    aligned: dict[str, DataSet]
    """Empty for the run without fusion."""
    use_gpu: bool
    board: Any
    """The actor that hears of steps."""


def is_trained(run: TrainRun, store: Store) -> bool:
    """Return whether a run's model is complete."""
    return "done.json" in store.sizes(run.folder)


def train_runs(recipe: Recipe, layout: Layout, progress: Progress) -> None:
    """Train every run that is not done yet, all at once.

    Raises:
        ValueError: A data set is not whole.
    """
    runs = [run for run in layout.runs if not is_trained(run, layout.store)]
    if not runs:
        return
    for data in (layout.corpus, *layout.aligned.values()):
        if not data.is_whole():
            raise ValueError(
                f"{data.folder} is not whole; run `rayfuse corpus`, `capture` and `align` first"
            )
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    fit: Any = ray.remote(num_cpus=0, max_retries=0)(_fit)
    waiting = [_plan_run(recipe, layout, run, board) for run in runs]
    at_once = _count_runs_at_once(waiting[0])
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(fit.remote(waiting.pop(0)))
        ready, running = ray.wait(running, timeout=POLL_SECONDS)
        ray.get(ready)
        steps: Any = ray.get(board.read.remote())
        for name, (step, num_steps) in steps.items():
            progress(f"train {name}", step, num_steps, "steps")


def _count_runs_at_once(task: WorkerTask) -> int:
    """Return how many runs the cluster has room for now; a second one beyond it would time out."""
    available = ray.cluster_resources()
    needed = _worker_resources(task)
    num_workers = task.recipe.train.num_workers
    rooms = [available.get(kind, 0) // (each * num_workers) for kind, each in needed.items()]
    return max(1, int(min(rooms)))


def _worker_resources(task: WorkerTask) -> dict[str, float]:
    """Return what one worker asks of Ray."""
    settings = task.recipe.train
    resources = {"CPU": settings.cpus_per_worker}
    if task.use_gpu:
        resources["GPU"] = settings.gpus_per_worker or 1.0
    return resources


def _plan_run(recipe: Recipe, layout: Layout, run: TrainRun, board: Any) -> WorkerTask:
    gpus = recipe.train.gpus_per_worker
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0 if gpus is None else gpus > 0
    is_fused = run.clm_weight < 1
    return WorkerTask(
        recipe=recipe,
        run=run,
        store=layout.store,
        corpus=layout.corpus,
        aligned=layout.aligned if is_fused else {},
        use_gpu=use_gpu,
        board=board,
    )


def _fit(task: WorkerTask) -> None:
    """Run one training to its end; in a process of its own, as Ray Train sets signal handlers."""
    settings = task.recipe.train
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if task.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=task.use_gpu,
            resources_per_worker=_worker_resources(task),
        ),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=f"{task.store.root}/{task.run.folder}",
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


def _train_worker(config: dict[str, Any]) -> None:
    """Train one worker's share of a run; rank 0 writes metrics and the model."""
    from rayfuse.model_files import load_recipe_tokenizer
    from rayfuse.models import load_causal_lm, resolve_dtype
    from rayfuse.train.engine import FusionModel, build_engine, save_model
    from rayfuse.train.feed import RowReader, iterate_steps
    from rayfuse.train.loop import train_steps
    from rayfuse.train.order import count_steps

    task: WorkerTask = config["task"]
    recipe, settings = task.recipe, task.recipe.train
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = "cuda" if task.use_gpu else "cpu"
    token_bytes = load_recipe_tokenizer(recipe.target).count_bytes()
    reader = RowReader(task.corpus, task.aligned, recipe.fuse, token_bytes)
    num_steps = count_steps(sum(reader.rows_per_shard), settings.rows_per_step, settings.epochs)
    lm = load_causal_lm(
        recipe.target.model,
        dtype=resolve_dtype(recipe.target.dtype, device),
        device=device,
        revision=recipe.target.revision,
        trust_remote_code=recipe.target.trust_remote_code,
    )
    lm.model.train()
    engine = build_engine(
        FusionModel(lm, settings.chunk_positions),
        settings,
        num_steps=num_steps,
        num_workers=num_workers,
        device=device,
    )
    records = _resume(engine)
    first_step = len(records)

    def after_step(metrics: Any) -> None:
        tokens_before = records[-1]["tokens"] if records else 0
        records.append(replace(metrics, tokens=tokens_before + metrics.tokens).to_record())
        if rank == 0:
            task.board.write.remote(task.run.name, metrics.step, num_steps)
        if metrics.step % settings.checkpoint_every_steps == 0 and metrics.step < num_steps:
            _checkpoint(engine, records, metrics.step)

    steps = iterate_steps(
        reader,
        seed=recipe.seed,
        epochs=settings.epochs,
        rows_per_step=settings.rows_per_step,
        micro_batch_rows=settings.micro_batch_rows,
        rank=rank,
        num_workers=num_workers,
        first_step=first_step,
    )
    train_steps(
        engine,
        steps,
        clm_weight=task.run.clm_weight,
        first_step=first_step,
        num_workers=num_workers,
        after_step=after_step,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(engine, folder, rank=rank)
        if rank == 0:
            _publish(task, Path(folder), records)


def _checkpoint(engine: Any, records: list[dict[str, Any]], step: int) -> None:
    """Save the engine and the metrics so far; every rank must call."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="ds")
        if ray.train.get_context().get_world_rank() == 0:
            Path(folder, "metrics.jsonl").write_text(_to_lines(records))
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step_{step:06d}",
        )


def _resume(engine: Any) -> list[dict[str, Any]]:
    """Load the last checkpoint, if there is one, and return the metrics of the steps done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        engine.load_checkpoint(folder, tag="ds")
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _publish(task: WorkerTask, folder: Path, records: list[dict[str, Any]]) -> None:
    """Put the model, its tokenizer and the metrics into the store; `done.json` comes last."""
    from transformers import AutoTokenizer

    target = task.recipe.target
    tokenizer = AutoTokenizer.from_pretrained(
        target.model, revision=target.revision, trust_remote_code=target.trust_remote_code
    )
    tokenizer.save_pretrained(folder)
    for file in sorted(folder.iterdir()):
        task.store.write(f"{task.run.folder}/model/{file.name}", file.read_bytes())
    task.store.write(f"{task.run.folder}/metrics.jsonl", _to_lines(records).encode())
    done = {
        "fingerprint": task.run.fingerprint,
        "finished": time.time(),
        "recipe": dump_recipe(task.recipe),
        "steps": len(records),
    }
    task.store.write(f"{task.run.folder}/done.json", json.dumps(done, indent=1).encode())


def _to_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
