"""The likeliest mistakes, with the message that each one gets before a cluster is joined.

A mistake that has a test of its own elsewhere is not repeated here.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3fs import S3FileSystem

from rayfuse import cli, pipeline
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer, sentencepiece_tokenizer


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a recipe or a command, and a part of its message."""

    message: str
    """MODELS and FOLDER stand for the folders of the models and of the recipe."""
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Sections of the recipe, or settings in them, that are replaced."""
    arguments: tuple[str, ...] = ()
    command: str = "run"
    prepare: Callable[[Path], object] = lambda folder: None
    """Changes files of the recipe's folder."""
    environment: dict[str, str] = field(default_factory=dict[str, str])


SOURCE = {"name": "a", "model": "MODELS/source"}

NO_CREDENTIALS = {"HOME": "/nowhere", "AWS_EC2_METADATA_DISABLED": "true"}

MISTAKES = {
    "a bucket without credentials": Mistake(
        "s3://bucket/run cannot be accessed (Unable to locate credentials); give this computer, "
        "and every node, credentials",
        changes={"storage": "s3://bucket/run"},
        environment=NO_CREDENTIALS,
    ),
    "documents in a bucket without credentials": Mistake(
        "documents s3://bucket/docs.jsonl cannot be accessed (Unable to locate credentials); give",
        changes={"corpus": {"documents": "s3://bucket/docs.jsonl"}},
        environment=NO_CREDENTIALS,
    ),
    "a profile that is missing": Mistake(
        "s3://bucket/run cannot be accessed (The config profile (work) could not be found); set "
        "AWS_PROFILE to a profile of ~/.aws/config",
        changes={"storage": "s3://bucket/run"},
        environment=NO_CREDENTIALS | {"AWS_PROFILE": "work"},
    ),
    "the recipe's path": Mistake(
        "the recipe FOLDER/recipe.yaml cannot be read",
        prepare=lambda folder: (folder / "recipe.yaml").unlink(),
    ),
    "the recipe is plain text": Mistake(
        "holds no settings; begin with `storage: FOLDER`",
        prepare=lambda folder: (folder / "recipe.yaml").write_text("fuse two models"),
    ),
    "a bracket is open": Mistake(
        "recipe.yaml is not valid YAML",
        prepare=lambda folder: (folder / "recipe.yaml").write_text("storage: ["),
    ),
    "an override without a value": Mistake(
        "override 'train.lambda' is not of the form section.key=value", arguments=("train.lambda",)
    ),
    "an unknown section": Mistake(
        "trian is no setting of rayfuse; did you mean 'train'?", arguments=("trian.epochs=2",)
    ),
    "a setting in the wrong section": Mistake(
        "capture.epochs is no setting of rayfuse; known here: signal, top_k",
        arguments=("capture.epochs=2",),
    ),
    "no storage": Mistake("storage is missing; it has no default", changes={"storage": None}),
    "no source": Mistake("sources is empty; give 1 or more", changes={"sources": []}),
    "a source without a model": Mistake(
        "sources.0.model is missing; it has no default", changes={"sources": [{"name": "a"}]}
    ),
    "two sources of one name": Mistake(
        "two sources have the name 'a'; give each its own name",
        changes={"sources": [SOURCE, SOURCE]},
    ),
    "a source named target": Mistake(
        "sources.0.name is 'target': target, clm, fused, ensemble, merged, all, fused-...",
        changes={"sources": [SOURCE | {"name": "target"}]},
    ),
    "a source's name with a slash": Mistake(
        "sources.0.name is 'org/model': use letters, digits",
        changes={"sources": [SOURCE | {"name": "org/model"}]},
    ),
    "a weight of no source": Mistake(
        "the recipe: fuse.weights names 'b', which is no source; sources: a",
        changes={"fuse": {"weights": {"b": 2.0}}},
    ),
    "lambda in percent": Mistake(
        "train.lambda is 90: lambda is a share, but 90 is not between 0 and 1",
        arguments=("train.lambda=90",),
    ),
    "a learning rate of 0": Mistake(
        "train.learning_rate is 0: input should be greater than 0",
        arguments=("train.learning_rate=0",),
    ),
    "a learning rate that is text": Mistake(
        "train.learning_rate is 'fast': input should be a valid number",
        arguments=("train.learning_rate=fast",),
    ),
    "an unknown rule": Mistake(
        "fuse.method is 'mince': input should be 'min_ce', 'avg_ce' or 'fixed_share'",
        changes={"fuse": {"method": "mince"}},
    ),
    "best without validations": Mistake(
        "train: publish is best, but validation_rows is 0; raise it",
        arguments=("train.publish=best", "train.validation_rows=0"),
    ),
    "fewer rows than workers": Mistake(
        "rows_per_step 3 is below num_workers 4",
        arguments=("train.rows_per_step=3", "train.num_workers=4"),
    ),
    "a GPU and a half": Mistake(
        "gpus is 1.5; an actor has a part of one GPU, or a whole number",
        arguments=("sources.a.gpus=1.5",),
    ),
    "draws from vLLM": Mistake(
        "source a has backend vllm, which makes no draws, but capture.signal is sampled",
        arguments=("sources.a.backend=vllm", "capture.signal=sampled"),
    ),
    "a source on GPUs without bfloat16": Mistake(
        "sources.a.accelerator_type is T4, which does not compute in bfloat16, the default of "
        "models on GPUs; set sources.a.dtype=float16, or another accelerator_type",
        arguments=("sources.a.accelerator_type=T4",),
    ),
    "quantised weights on GPUs without bfloat16": Mistake(
        "sources.a.accelerator_type is T4, which does not compute in bfloat16, as models of dtype "
        "int4 do; set sources.a.dtype=float16, or another accelerator_type",
        arguments=("sources.a.accelerator_type=T4", "sources.a.dtype=int4"),
    ),
    "training on GPUs without bfloat16": Mistake(
        "train.accelerator_type is T4, which does not compute in bfloat16, the default of models "
        "on GPUs; set target.dtype=float32, or another accelerator_type",
        arguments=("train.accelerator_type=T4",),
    ),
    "more actors at first than at most": Mistake(
        "max_actors 1 is below min_actors 2; raise it",
        arguments=("sources.a.min_actors=2", "sources.a.max_actors=1"),
    ),
    "a model's folder is elsewhere": Mistake(
        "target: model is '/nowhere/llama', a folder that does not exist; check the path",
        changes={"target": {"model": "/nowhere/llama"}},
    ),
    "a folder without a model": Mistake(
        "target: model is 'FOLDER/empty', a folder without config.json and *.safetensors",
        changes={"target": {"model": "FOLDER/empty"}},
        prepare=lambda folder: (folder / "empty").mkdir(),
    ),
    "a hub id without a network": Mistake(
        "target: model is 'org/model', which is not a local folder and cannot be read from the hub",
        changes={"target": {"model": "org/model"}},
    ),
    "rows longer than the context": Mistake(
        "corpus.max_tokens is 4096, more than the context of 512 tokens of target",
        arguments=("corpus.max_tokens=4096",),
    ),
    "credentials in the storage": Mistake(
        "contains credentials; remove them",
        changes={"storage": "s3://KEY:SECRET@bucket/run"},
    ),
    "a storage that cannot be written": Mistake(
        "storage is '/proc/run', which cannot be written", changes={"storage": "/proc/run"}
    ),
    "documents that match nothing": Mistake(
        "no documents were found", changes={"corpus": {"documents": "FOLDER/*.json.gz"}}
    ),
    "documents of an unknown format": Mistake(
        "corpus.documents is 'FOLDER/docs.pdf', a name without a known format; set format: jsonl",
        changes={"corpus": {"documents": "FOLDER/docs.pdf"}},
        prepare=lambda folder: (folder / "docs.pdf").write_bytes(b"%PDF-1.7"),
    ),
    "held-out documents that are missing": Mistake(
        "evaluate.documents is '/nowhere/held.jsonl', where no documents were found",
        changes={"evaluate": {"documents": "/nowhere/held.jsonl"}},
    ),
    "a folder of tasks that is missing": Mistake(
        "evaluate.tasks.folder is '/nowhere', a folder that does not exist; check the path",
        changes={"evaluate": {"tasks": {"names": ["x"], "folder": "/nowhere"}}},
    ),
    "a stage before its input": Mistake("stage align is incomplete", command="train"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_model("llama", 330, root / "target")
    save_tokenizer(sentencepiece_tokenizer(330), root / "target", bos="<s>", eos="</s>")
    save_model("gpt2", 300, root / "source")
    save_tokenizer(byte_level_tokenizer(300), root / "source", bos="<|end|>", eos="<|end|>")
    return root


def write_recipe(folder: Path, changes: dict[str, Any]) -> None:
    """Write a recipe that is right but for the changes; None removes a section."""
    (folder / "docs.jsonl").write_text('{"text": "some text"}\n')
    recipe: dict[str, Any] = {
        "storage": "FOLDER/storage",
        "corpus": {"documents": "FOLDER/docs.jsonl", "max_tokens": 64},
        "target": {"model": "MODELS/target"},
        "sources": [SOURCE],
    }
    for name, change in changes.items():
        recipe[name] = recipe.get(name, {}) | change if isinstance(change, dict) else change
    kept = {name: value for name, value in recipe.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(kept))


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_its_message_before_a_cluster_is_joined(
    mistake: Mistake, models: Path, tmp_path: Path, monkeypatch, capsys
):
    def join_cluster() -> None:
        raise AssertionError("a cluster is joined")

    places = {"MODELS": str(models), "FOLDER": str(tmp_path)}

    def place(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, path)
        return text

    write_recipe(tmp_path, json.loads(place(json.dumps(mistake.changes))))
    path = tmp_path / "recipe.yaml"
    path.write_text(place(path.read_text()))
    mistake.prepare(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in mistake.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # of tests with credentials
    monkeypatch.setattr(pipeline, "join_cluster", join_cluster)
    monkeypatch.setattr(sys, "argv", ["rayfuse", mistake.command, str(path), *mistake.arguments])
    assert cli._run_command() == 2
    error = capsys.readouterr().err
    assert error.startswith("rayfuse: error: ")
    assert place(mistake.message).replace(f"storage: {tmp_path}", "storage: FOLDER") in error
    assert "Traceback" not in error
