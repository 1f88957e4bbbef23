"""Every model of a run is scored once, on all held-out shards."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from rayfuse.config.base import UserError
from rayfuse.config.evaluate import EvaluateSettings, TasksSettings
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import ModelSettings, TrainedSettings
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bits_per_byte import (
    load_scored_model,
    score_documents,
    score_rows,
    score_tokens,
)
from rayfuse.evaluate.ensemble import TokenNLL, average_sources
from rayfuse.evaluate.model_loading import local_model
from rayfuse.evaluate.scores import bits_per_byte
from rayfuse.evaluate.stage import (
    _plan_job,
    evaluate_models,
    group_shards,
)
from rayfuse.evaluate.task_resources import choose_resources
from rayfuse.evaluate.task_scores import parse_task_score
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.run.budget import Budget, Limits
from rayfuse.run.layout import EvaluationFiles, Layout, Merge, TrainRun
from rayfuse.run.prepare import SplitDocuments
from rayfuse.run.segmentation import Segmentation
from rayfuse.runtime.progress import ProgressEvent, StoppedEarly, report_nothing
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import hash_bytes, write_record
from rayfuse.storage.manifest import Commit
from rayfuse.storage.object_store import ObjectStore
from rayfuse.storage.store import LocalStore, open_store
from tests.evaluate.test_tasks import make_tasks
from tests.inline_ray import InlineRay

KILLS = 4
"""More than the 3 retries of a task that Ray makes by default."""

WRITE = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "x",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def commit(shard: int, tokens: int, rows: int = 1) -> Commit:
    return Commit(shard, "file", 1, "hash", rows, tokens, 0, "attempt")


def test_small_shards_share_a_task_and_empty_ones_need_none():
    commits = [commit(3, 10), commit(0, 40), commit(1, 40), commit(2, 40), commit(4, 0, rows=0)]
    assert group_shards(commits, task_tokens=100) == [[0, 1], [2, 3]]
    assert group_shards(commits, task_tokens=1) == [[0], [1], [2], [3]]
    assert group_shards([], task_tokens=100) == []


@dataclass(frozen=True)
class NoReadStore(ObjectStore):
    """Object storage in which reading anything but a record into memory is an error."""

    def read(self, name: str) -> bytes:
        assert name.endswith("/done.json"), f"{name} was read into memory"
        return super().read(name)


def mark_trained(layout: Layout) -> None:
    """Write the record of the trained model, as training does in the end."""
    folder = Path(layout.store.root, "train/fused-0")
    files = {f"model/{path.name}": hash_bytes(path.read_bytes()) for path in folder.glob("model/*")}
    write_record(layout.store, "train/fused-0/done.json", {"inputs": {}}, files)


def test_a_model_in_object_storage_is_streamed_to_disk_and_removed_afterwards():
    store = NoReadStore("memory://bucket/run")
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    for name, data in files.items():
        store.write(f"train/x/model/{name}", data)
    listed = {f"model/{name}": hash_bytes(data) for name, data in files.items()}
    write_record(store, "train/x/done.json", {"inputs": {}}, listed)
    model = ModelSettings(model=f"{store.root}/train/x/model", dtype="bfloat16")
    with local_model(model, store, "train/x/model") as local:
        found = {path.name: path.read_bytes() for path in Path(local.model).iterdir()}
        assert found == files
        assert local.dtype == "bfloat16"
    assert not Path(local.model).exists()


def test_a_local_model_or_one_of_the_hub_is_not_copied(tmp_path: Path):
    model = ModelSettings(model="some/model")
    with local_model(model, NoReadStore("memory://bucket/run"), None) as local:
        assert local == model
    with local_model(model, LocalStore(str(tmp_path)), "train/x/model") as local:
        assert local == model


@pytest.fixture
def recipe(tmp_path: Path, make_model: Callable[[int], Path]) -> Recipe:
    return parse_recipe(
        {
            "storage": str(tmp_path / "store"),
            "corpus": {"documents": "unused.jsonl", "max_tokens": 64},
            "target": {"model": str(make_model(260))},
            "sources": [
                {"name": "small", "model": str(make_model(257))},
                {"name": "other", "model": str(make_model(260))},
            ],
        }
    )


@pytest.fixture
def layout(recipe: Recipe, rows: pa.Table) -> Layout:
    store = open_store(recipe.storage)
    held_out = DataSet(store, "corpus", "held-out", "0")
    held_out.claim({})
    held_out.write_shard(0, rows.slice(0, 3), tokens=3)
    held_out.write_shard(1, rows.slice(3), tokens=2)
    held_out.finish(2)
    run = TrainRun("fused", "train/fused-0", "0", True)
    shutil.copytree(recipe.target.model, f"{recipe.storage}/{run.folder}/model")
    names = ["small", "other", "target", "fused", "ensemble", "merged"]
    evaluations = {name: f"evaluate/{name}-0.json" for name in names}
    segmentation = Segmentation("0", "corpus/held-out-segmentation-0.json", (), (), is_reused=False)
    documents = SplitDocuments((), segmentation)
    token_nll = {n: DataSet(store, "evaluate", f"tokens-{n}", f"{n}0") for n in ("small", "other")}
    return Layout(
        store=store,
        corpus=held_out,
        corpus_documents=documents,
        held_out=held_out,
        held_out_documents=documents,
        captured={},
        aligned={},
        map_files={},
        runs=(run,),
        evaluation=EvaluationFiles(
            scores=evaluations,
            token_nll=token_nll,
            merge=Merge("evaluate/merged-model-0", ("other",)),
        ),
    )


def score_source(model: str, rows: pa.Table) -> list[TokenNLL]:
    lm = load_scored_model(ModelSettings(model=model))
    return score_tokens(lm, load_tokenizer(model), rows, name=model, batch_tokens=500)


class Notes:
    """Records the calls of progress."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, float]] = []

    def __call__(self, event: ProgressEvent) -> None:
        self.calls.append((event.title, event.done, event.total))


@pytest.mark.ray
def test_every_model_is_scored_once_on_all_held_out_rows(
    ray_cluster: Any, recipe: Recipe, layout: Layout, rows: pa.Table
):
    mark_trained(layout)
    notes = Notes()
    found = evaluate_models(recipe, layout, notes)
    assert {name: evaluation.role for name, evaluation in found.items()} == {
        "small": "source",
        "other": "source",
        "target": "target",
        "fused": "fused",
        "ensemble": "ensemble",
        "merged": "merged",
    }
    models = dict(zip(["small", "other", "target"], [*recipe.sources, recipe.target], strict=True))
    for name, model in models.items():
        lm = load_scored_model(ModelSettings(model=model.model))
        nats = score_rows(lm, load_tokenizer(model.model), rows, name=name, batch_tokens=500)
        expected = bits_per_byte(score_documents(rows, nats))
        assert bits_per_byte(found[name].documents) == pytest.approx(expected, rel=1e-5)
    assert [d.nats for d in found["fused"].documents] == pytest.approx(
        [d.nats for d in found["target"].documents]
    )
    # `other` is made like the target: the mean of the two is either.
    assert [d.nats for d in found["merged"].documents] == pytest.approx(
        [d.nats for d in found["target"].documents], rel=1e-6
    )
    sources = [score_source(model.model, rows) for model in recipe.sources]
    mean = [average_sources(row).nats.sum() for row in zip(*sources, strict=True)]
    expected = bits_per_byte(score_documents(rows, np.array(mean)))
    assert bits_per_byte(found["ensemble"].documents) == pytest.approx(expected, rel=1e-5)
    assert found["ensemble"].model == "small, other"
    record = json.loads(layout.store.read("evaluate/small-0.json"))
    own = {"name", "role", "model", "bits_per_byte", "documents", "seconds"}
    assert set(record) == own | {"inputs", "record_sha256"}
    assert ("evaluate small", 2, 2) in notes.calls

    again = Notes()
    assert evaluate_models(recipe, layout, again) == found
    assert again.calls == []

    # Without its result the ensemble is computed again from the stored token NLL; no model is
    # loaded for that.
    layout.store.remove("evaluate/ensemble-0.json")
    assert (
        evaluate_models(recipe, layout, again)["ensemble"].documents == found["ensemble"].documents
    )
    assert {title for title, *_ in again.calls} == {"evaluate ensemble"}


@pytest.mark.ray
def test_fault_1_a_scoring_task_survives_more_losses_than_ray_retries_by_default(
    ray_cluster: Any, recipe: Recipe, tmp_path: Path
):
    import ray

    def die_at_first(folder: Path) -> int:
        lives = len(list(folder.iterdir()))
        (folder / str(lives)).touch()
        if lives < KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        return lives

    task: Any = ray.remote(**choose_resources(recipe.sources[0], recipe))(die_at_first)
    assert ray.get(task.remote(tmp_path)) == KILLS


@pytest.mark.ray
def test_every_model_runs_every_task_once(
    ray_cluster: Any, recipe: Recipe, layout: Layout, tmp_path: Path
):
    mark_trained(layout)
    folder = str(make_tasks(tmp_path / "tasks"))
    make_tasks(tmp_path / "tasks", task="write", **WRITE)
    tasks = TasksSettings(names=("choose", "write"), folder=folder, data=folder)
    recipe = recipe.model_copy(update={"evaluate": EvaluateSettings(tasks=tasks)})
    files = {
        name: {task: f"evaluate/task-{name}-{task}-0.json" for task in tasks.names}
        for name in layout.evaluation.scores
    }
    costs = {
        name: {task: f"evaluate/task-{name}-{task}-0.parquet" for task in tasks.names}
        for name in layout.evaluation.token_nll
    }
    results = replace(layout.evaluation, task_scores=files, task_nll=costs)
    layout = replace(layout, evaluation=results)
    evaluate_models(recipe, layout, Notes())
    found = {
        name: {task: parse_task_score(layout.store.read(file)) for task, file in own.items()}
        for name, own in files.items()
    }
    assert found["fused"]["choose"].subtasks == found["target"]["choose"].subtasks
    assert len(found["small"]["choose"].subtasks[0].values) == 3
    assert found["ensemble"]["choose"].subtasks[0].questions == (
        found["small"]["choose"].subtasks[0].questions
    )
    assert found["small"]["write"].subtasks
    assert not found["ensemble"]["write"].subtasks  # sources cannot generate together

    again = Notes()
    layout.store.remove(files["small"]["choose"])
    layout.store.remove(files["ensemble"]["choose"])
    evaluate_models(recipe, layout, again)
    assert [title for title, *_ in again.calls] == [
        "evaluate tasks of small",
        "evaluate tasks of ensemble",
    ]
    assert parse_task_score(layout.store.read(files["small"]["choose"])).subtasks == (
        found["small"]["choose"].subtasks
    )


@pytest.mark.ray
def test_a_model_that_is_not_trained_yet_is_named(ray_cluster: Any, recipe: Recipe, layout: Layout):
    with pytest.raises(ValueError, match="model fused is not trained; run `rayfuse train` first"):
        evaluate_models(recipe, layout, Notes())


@pytest.mark.ray
def test_an_error_in_a_ray_task_is_raised_as_itself(
    ray_cluster: Any, recipe: Recipe, layout: Layout, tmp_path: Path
):
    mark_trained(layout)
    broken = shutil.copytree(recipe.sources[0].model, tmp_path / "broken")
    (broken / "config.json").unlink()
    source = recipe.sources[0].model_copy(update={"model": str(broken)})
    recipe = recipe.model_copy(update={"sources": (source, *recipe.sources[1:])})
    with pytest.raises(ValueError, match=r"^model is '.*/broken'"):
        evaluate_models(recipe, layout, Notes())


def test_a_trained_model_that_lost_a_tensor_is_refused_before_a_task_starts(
    recipe: Recipe, layout: Layout
):
    mark_trained(layout)
    _plan_job(recipe, layout, "fused")
    path = Path(recipe.storage, "train/fused-0/model/model.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    save_file({key: tensors[key] for key in tensors if key != name}, path)
    mark_trained(layout)
    with pytest.raises(
        UserError, match=rf"model fused is no longer .*{name} is missing.*done.json"
    ):
        _plan_job(recipe, layout, "fused")


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_the_storage_never_runs_for_a_target_with_its_own_code(
    tmp_path: Path, make_model: Callable[[int], Path]
):
    target, stored = tmp_path / "target", tmp_path / "stored"
    for folder in (target, stored):
        shutil.copytree(make_model(260), folder)
        config = json.loads((folder / "config.json").read_text()) | {
            "model_type": "own",
            "auto_map": {
                "AutoConfig": "modeling_own.OwnConfig",
                "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
                "AutoTokenizer": ["modeling_own.Own", None],
            },
        }
        (folder / "config.json").write_text(json.dumps(config))
        marker = str(tmp_path / f"{folder.name}-ran")
        (folder / "modeling_own.py").write_text(CODE.format(marker=marker))
    own = ModelSettings(model=str(target), trust_remote_code=True)
    trained = TrainedSettings(model=str(stored), trust_remote_code=True, target=own)
    lm = load_scored_model(trained)
    assert type(lm.model).__name__ == "OwnForCausalLM"
    assert load_recipe_tokenizer(trained) is load_recipe_tokenizer(own)
    assert (tmp_path / "target-ran").exists()
    assert not (tmp_path / "stored-ran").exists()


def test_at_a_limit_evaluation_stops_once_a_score_is_stored_so_that_each_command_adds_one(
    recipe: Recipe, layout: Layout, monkeypatch: pytest.MonkeyPatch
):
    mark_trained(layout)
    for name in ("choose_resources", "count_work"):  # these need a cluster
        monkeypatch.setattr(f"rayfuse.evaluate.stage.{name}", lambda *_, **__: {})
    corpus = recipe.corpus.model_copy(update={"shard_tokens": 2})  # a task per shard
    recipe = recipe.model_copy(update={"corpus": corpus})
    names = [name for name in layout.evaluation.scores if name != "ensemble"]
    for number in range(1, len(names) + 1):
        fake = InlineRay()
        for module in ("rayfuse.evaluate.stage", "rayfuse.runtime.wait"):
            monkeypatch.setattr(f"{module}.ray", fake)
        budget = Budget(Limits(max_dollars=1.0), {f"evaluate {name}": 1e12 for name in names})
        events: list[ProgressEvent] = []
        with pytest.raises(StoppedEarly):
            evaluate_models(recipe, layout, budget.watch(events.append), budget.is_reached)
        assert [event.done for event in events] == [1, 2]
        scored = [n for n in names if Path(layout.store.root, f"evaluate/{n}-0.json").is_file()]
        assert len(scored) == number
        assert len(fake.cancelled) == 2 * (len(names) - number)
    budget = Budget(Limits(max_dollars=1.0), {f"evaluate {name}": 1e12 for name in names})
    found = evaluate_models(recipe, layout, budget.watch(report_nothing), budget.is_reached)
    assert set(found) == {*names, "ensemble"}
