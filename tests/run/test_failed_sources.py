"""Sources with `required: false`: the run continues without one whose capture fails."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

import rayfuse
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.capture.stage import _handle_errors
from rayfuse.config.base import UserError
from rayfuse.config.load import parse_recipe
from rayfuse.run.failed_sources import (
    FAILURE_FILE,
    drop_sources,
    forget_failure,
    plan_run,
    read_failures,
    record_failure,
)
from rayfuse.run.layout import plan_layout
from rayfuse.runtime.progress import StoppedEarly
from rayfuse.storage.retry import AccessSettingsError, StorageUnavailableError
from rayfuse.storage.seal import ShardError
from rayfuse.watch.snapshot import RunReader
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer
from tests.small_run import write_recipe
from tests.stored_run import write_run

SENTENCE = r"Source bad is not part of this run: its capture failed \(.*not finite"


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Any]:
    """Store the rows of a recipe with the sources neox and gpt2, neither of them required."""
    recipe = write_run(tmp_path_factory.mktemp("run"))
    values = recipe.model_dump(mode="json", by_alias=True)
    for source in values["sources"]:
        source["required"] = False
    return values


def test_a_record_counts_until_a_setting_changes_or_the_source_is_required(stored, tmp_path):
    values = {**stored, "storage": str(tmp_path / "storage")}
    recipe = parse_recipe(values)
    layout = plan_layout(recipe, ALIGN_FACTS)
    assert read_failures(recipe, layout) == {}
    record_failure(recipe, layout, "gpt2", "no GPU")
    assert read_failures(recipe, layout) == {"gpt2": "no GPU"}

    required = parse_recipe(
        {**values, "sources": [values["sources"][0], {**values["sources"][1], "required": True}]}
    )
    assert read_failures(required, layout) == {}
    smaller = parse_recipe(
        {**values, "sources": [values["sources"][0], {**values["sources"][1], "batch_tokens": 64}]}
    )
    assert read_failures(smaller, layout) == {}
    assert read_failures(parse_recipe({**values, "capture": {"chunk_positions": 8}}), layout) == {}

    record_failure(recipe, layout, "neox", "no GPU either")
    assert read_failures(recipe, layout) == {}  # a run needs a source: all are captured again


def test_a_corrupt_record_counts_as_none(stored, tmp_path):
    recipe = parse_recipe({**stored, "storage": str(tmp_path / "storage")})
    layout = plan_layout(recipe, ALIGN_FACTS)
    record_failure(recipe, layout, "gpt2", "no GPU")
    file = tmp_path / "storage" / layout.captured["gpt2"].folder / FAILURE_FILE
    file.write_bytes(file.read_bytes().replace(b"GPU", b"CPU"))
    assert read_failures(recipe, layout) == {}


def test_a_complete_capture_outlasts_the_record_of_an_earlier_failure(stored):
    recipe = parse_recipe(stored)
    layout = plan_layout(recipe, ALIGN_FACTS)
    record_failure(recipe, layout, "gpt2", "no GPU")
    assert read_failures(recipe, layout) == {}
    forget_failure(layout.captured["gpt2"])
    file = f"{layout.captured['gpt2'].folder}/{FAILURE_FILE}"
    assert file.rpartition("/")[2] not in layout.store.sizes(layout.captured["gpt2"].folder)


def test_sources_without_a_weight_are_no_run(stored, tmp_path):
    weights = {"fuse": {**stored["fuse"], "weights": {"neox": 0.0}}}
    recipe = parse_recipe({**stored, "storage": str(tmp_path / "storage"), **weights})
    layout = plan_layout(recipe, ALIGN_FACTS)
    record_failure(recipe, layout, "gpt2", "no GPU")
    assert read_failures(recipe, layout) == {}  # nothing would be learned from neox


@pytest.mark.parametrize(
    "error",
    [
        ShardError("corrupt"),
        StorageUnavailableError("down"),
        AccessSettingsError("no credentials"),
        ConnectionError("lost"),
        PermissionError(13, "Permission denied"),
        OSError(28, "No space left on device"),
        StoppedEarly(),
        KeyboardInterrupt(),
    ],
)
def test_a_fault_of_all_sources_is_no_failure_of_one(stored, tmp_path, error):
    recipe = parse_recipe({**stored, "storage": str(tmp_path / "storage")})
    layout = plan_layout(recipe, ALIGN_FACTS)
    outcomes = [(recipe.sources[0], None), (recipe.sources[1], error)]
    with pytest.raises(type(error)):
        _handle_errors(recipe, layout, outcomes)
    assert read_failures(recipe, layout) == {}
    _handle_errors(recipe, layout, [(recipe.sources[1], RuntimeError("CUDA error\nat"))])
    assert read_failures(recipe, layout) == {"gpt2": "CUDA error"}


def test_the_folders_are_those_of_the_recipe_without_the_source(stored, tmp_path):
    values = {
        **stored,
        "storage": str(tmp_path / "storage"),
        "fuse": {**stored["fuse"], "weights": {"gpt2": 2.0, "neox": 0.5}},
    }
    recipe = parse_recipe(values)
    complete = plan_layout(recipe, ALIGN_FACTS)
    record_failure(recipe, complete, "gpt2", "no GPU")
    layout = plan_run(recipe, ALIGN_FACTS)
    assert layout.failed == {"gpt2": "no GPU"}
    assert list(layout.captured) == list(layout.aligned) == ["neox"]
    assert layout.corpus == complete.corpus  # rows stay split for both
    assert layout.captured["neox"] == complete.captured["neox"]
    assert layout.runs != complete.runs
    assert layout.evaluation.scores.keys() == {
        "neox",
        "target",
        "fused",
        "clm",
    }  # no ensemble of one
    rest = drop_sources(recipe, layout.failed)
    assert rest.fuse.weights == {"neox": 0.5}
    assert recipe.fuse.weights == {"gpt2": 2.0, "neox": 0.5}


def test_an_import_is_always_required(stored):
    values = {**stored, "sources": [{**stored["sources"][0], "captured_from": "/store"}]}
    with pytest.raises(UserError, match=r"required is false, .* imported from '/store'"):
        parse_recipe(values)


def write_two(folder: Path, **changes: Any) -> Path:
    """Write a recipe with a sound source, and one whose weights are not finite."""
    path = write_recipe(folder)
    save_model("gpt2", 280, folder / "bad")
    save_tokenizer(byte_level_tokenizer(270), folder / "bad", bos="<|end|>", eos="<|end|>")
    weights = folder / "bad" / "model.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: tensor * float("nan") for name, tensor in tensors.items()}, weights, {"format": "pt"}
    )
    values = yaml.safe_load(path.read_text())
    values["sources"].append({"name": "bad", "model": str(folder / "bad"), "required": False})
    values["train"]["num_workers"] = 1
    path.write_text(yaml.safe_dump(values | changes))
    return path


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_continues_without_a_source_that_fails_and_every_table_notes_it(
    tmp_path, ray_cluster, capsys
):
    path = write_two(tmp_path)
    reader = RunReader(rayfuse.open_run(path).recipe)
    run = rayfuse.open_run(path)
    values = run.execute()
    assert all(values["stages"].values())
    assert list(values["failed_sources"]) == ["bad"]
    assert set(values["models"]) == {"neox", "target", "clm", "fused"}
    storage = tmp_path / "storage"
    for file in ("index.html", "table.md"):
        assert re.search(SENTENCE, (storage / "report" / file).read_text()), file
    card = next(storage.glob("train/fused-*/model/README.md")).read_text()
    assert re.search(SENTENCE, card)
    assert re.search(SENTENCE, capsys.readouterr().err.replace("\n", " "))

    snapshot = reader.read()  # of a page that was open before
    assert snapshot.sources == ("neox",)
    assert re.search(SENTENCE, snapshot.faults[0])
    assert list(run.status()["data_sets"]) == ["corpus", "held-out", "capture neox", "align neox"]
    assert not any(part["corrupt"] for part in run.verify()["data_sets"].values())

    again = run.execute()
    assert again["models"] == values["models"]
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="not finite"):
        rayfuse.open_run(path, **{"sources.bad.required": True}).execute("capture")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_without_any_source_that_is_captured_ends_with_the_error(tmp_path, ray_cluster):
    path = write_two(tmp_path)
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "sources": values["sources"][1:]}))
    with pytest.raises(UserError, match="not finite"):
        rayfuse.open_run(path).execute(("corpus", "capture"))
