"""`rayfuse merge`: pairwise targets, their merges and the choice, from rows that are captured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

import rayfuse
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.api import Run
from rayfuse.config.merge import METHODS
from rayfuse.corpus.split import is_for_selection
from rayfuse.evaluate.scores import parse_evaluation
from rayfuse.merge.plan import MergePlan, plan_merge
from rayfuse.run.layout import plan_layout
from rayfuse.storage.seal import unseal
from tests.merge.formulas import FORMULAS
from tests.stored_run import write_rows, write_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAIN = {
    **{"num_workers": 1, "gpus_per_worker": 0, "rows_per_step": 4, "epochs": 2},
    **{"learning_rate": 3e-3, "validation_rows": 0, "baseline": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Run:
    """Store the rows of a run of two sources, with nothing trained."""
    folder = tmp_path_factory.mktemp("merge")
    recipe = write_run(folder, train=TRAIN, evaluate={"bootstrap_samples": 200})
    write_rows(recipe, plan_layout(recipe, ALIGN_FACTS).held_out, "h")
    return Run(recipe)


@pytest.fixture(scope="module")
def merged(run: Run) -> dict[str, Any]:
    """Merge, and check that nothing is captured again."""
    root = Path(run.recipe.storage)
    stages = ("corpus", "captured", "aligned")
    before = {stage: list_times(root / stage) for stage in stages}
    values = run.merge(quiet=True)
    assert {stage: list_times(root / stage) for stage in stages} == before
    return values


def list_times(folder: Path) -> dict[str, int]:
    """List every file of a folder with the time at which it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.stat().st_mtime_ns for path in files}


def make_plan(run: Run) -> MergePlan:
    return plan_merge(run.recipe, plan_layout(run.recipe, ALIGN_FACTS))


def test_every_target_and_merge_is_made_and_scored(run: Run, merged: dict[str, Any]):
    assert [*merged["models"]] == [
        "target",
        "fused-neox",
        "fused-gpt2",
        *(f"merged-{method}" for method in METHODS),
    ]
    plan = make_plan(run)
    for name, values in merged["models"].items():
        file = plan.layout.evaluation.scores[name]
        evaluation = parse_evaluation(plan.layout.store.read(file))
        expected = {"target": "target", "fused": "fused", "merged": "merged"}
        assert evaluation.role == expected[name.partition("-")[0]]
        for half, is_selection in (("selection", True), ("reported", False)):
            documents = [
                d for d in evaluation.documents if is_for_selection(d.doc_id) == is_selection
            ]
            nats, num_bytes = (sum(d.nats for d in documents), sum(d.num_bytes for d in documents))
            assert values["bits_per_byte"][half] == pytest.approx(nats / np.log(2) / num_bytes)
    bits = {n: v["bits_per_byte"]["selection"] for n, v in merged["models"].items()}
    del bits["target"]
    assert merged["chosen"] == min(bits, key=bits.__getitem__)
    assert len(set(bits.values())) == len(bits), "the models are not different"
    assert Path(merged["folder"], "model.safetensors").is_file()
    stored = unseal(Path(merged["results"]).read_bytes(), "results")
    assert stored["models"] == merged["models"]


@pytest.mark.parametrize("method", [*FORMULAS])
def test_a_stored_merge_is_the_formula_of_the_stored_targets(
    run: Run, merged: dict[str, Any], method: str
):
    models = merged["models"]
    folders = [models[f"fused-{name}"]["folder"] for name in ("neox", "gpt2")]
    base, *parts = (
        load_file(Path(folder, "model.safetensors"))
        for folder in (run.recipe.target.model, *folders)
    )
    weights = load_file(Path(models[f"merged-{method}"]["folder"], "model.safetensors"))
    settings = {name: getattr(run.recipe.merge, name) for name in METHODS[method].settings}
    settings |= {"weights": (1.0, 1.0)} if "weights" in settings else {}
    for name, tensor in weights.items():
        arrays = [part[name].double().numpy() for part in (base, *parts)]
        expected = FORMULAS[method](arrays[0], arrays[1:], **settings)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_a_second_call_does_nothing_and_the_command_prints_the_same(
    run: Run, merged: dict[str, Any], tmp_path: Path
):
    before = list_times(Path(run.recipe.storage))
    assert run.merge(quiet=True) == merged
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(run.recipe.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "rayfuse", "merge", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == merged
    assert "nothing to do: everything is complete" in done.stderr
    assert list_times(Path(run.recipe.storage)) == before


def test_a_new_setting_makes_one_merge_and_one_score(run: Run, merged: dict[str, Any]):
    root = Path(run.recipe.storage)
    before = list_times(root)
    methods = {"methods": ["linear", "ties"], "density": 0.2}
    changed = rayfuse.open_run(run.recipe, merge=methods)
    values = changed.merge(quiet=True)
    after = list_times(root)
    assert before.items() <= after.items()
    new = {Path(name).relative_to(root).parts[:2] for name in after.keys() - before.keys()}
    stems = sorted("/".join(part).rpartition("-")[0] for part in new)
    assert stems == ["evaluate/merged-ties", "merge/results", "merge/ties"]
    assert (
        values["models"]["merged-linear"]["folder"] == merged["models"]["merged-linear"]["folder"]
    )


def test_a_merge_that_is_lost_is_made_again_with_the_same_bytes(run: Run, merged: dict[str, Any]):
    folder = Path(merged["models"]["merged-dare"]["folder"])
    file, record = folder / "model.safetensors", folder.parent / "done.json"
    content = file.read_bytes()
    record.unlink()
    file.unlink()
    assert run.merge(quiet=True) == merged
    assert file.read_bytes() == content
    assert record.is_file()


def test_verify_finds_and_repairs_what_is_damaged(run: Run, merged: dict[str, Any]):
    root, models = Path(run.recipe.storage), merged["models"]
    assert run.status()["merge"] == f"2 of 2 targets, {len(METHODS)} of {len(METHODS)} merges"
    intact = run.verify(quiet=True)["data_sets"]
    labels = {"train fused-neox", "train fused-gpt2", "scores of merges"}
    labels |= {f"model merged-{method}" for method in METHODS}
    assert labels <= intact.keys()
    assert not any(found["corrupt"] for found in intact.values())
    plan = make_plan(run)
    damaged = {
        "model merged-ties": Path(models["merged-ties"]["folder"], "model.safetensors"),
        "train fused-gpt2": Path(models["fused-gpt2"]["folder"]).parent / "done.json",
        "scores of merges": root / plan.layout.evaluation.scores["merged-sce"],
    }
    folders = [values["folder"] for values in models.values() if values["folder"]]
    weights = [Path(folder, "model.safetensors") for folder in folders]
    content = {file: file.read_bytes() for file in weights}
    for file in damaged.values():
        data = file.read_bytes()
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    found = run.verify(quiet=True)["data_sets"]
    for label, file in damaged.items():
        name = str(file.relative_to(root))
        assert [fault["file"] for fault in found[label]["corrupt"]] == [name], label
    run.verify(quiet=True, repair=True)
    assert not any(each["corrupt"] for each in run.verify(quiet=True)["data_sets"].values())
    assert {file: file.read_bytes() for file in weights} == content
    assert run.merge(quiet=True) == merged
