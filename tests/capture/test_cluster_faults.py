"""Faults that capture must survive, by number: those that need a cluster."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch
import yaml

from rayfuse.capture.engine import Engine, load_transformers_engine
from rayfuse.capture.record import NOT_FINITE
from rayfuse.capture.stage import MOST_INIT_DEATHS, capture_sources
from rayfuse.corpus.stage import build_corpora
from rayfuse.pipeline import prepare_run
from rayfuse.progress import report_nothing
from rayfuse.recipe import CaptureSettings, ModelSettings, Recipe, parse_recipe
from rayfuse.schema import flatten_column
from rayfuse.storage.dataset import DataSet
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer

pytestmark = pytest.mark.ray

VOCAB = 300


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("target", "sound", "poisoned"):
        save_model("llama", VOCAB + 20, folder / name)
        save_tokenizer(byte_level_tokenizer(VOCAB), folder / name, bos="<|end|>", eos="<|end|>")
    return folder


def write_recipe(models: Path, folder: Path, *sources: str, **corpus: int) -> Recipe:
    return parse_recipe(
        {
            "storage": str(folder / "storage"),
            "corpus": {"documents": str(folder / "docs.jsonl"), "max_tokens": 256, **corpus},
            "target": {"model": str(models / "target")},
            "sources": [{"name": name, "model": str(models / name)} for name in sources],
            "evaluate": {"documents": str(folder / "held_out.txt")},
        }
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    lines = (json.dumps({"id": f"good{i}", "text": SAMPLE[i % 4]}) for i in range(40))
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    (tmp_path / "held_out.txt").write_text(SAMPLE[0])
    return tmp_path


def load_dying_engine(
    source: ModelSettings, settings: CaptureSettings, *, tombs: Path, deaths: int
) -> Engine:
    """Load a model, at a later attempt: the first ones are killed in the middle of it."""
    if len(list(tombs.iterdir())) < deaths:
        (tombs / uuid.uuid4().hex).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return load_transformers_engine(source, settings)


@pytest.mark.parametrize("deaths", [2, 1000])
def test_fault_2_a_few_deaths_in_a_models_load_are_survived_and_many_stop_the_run(
    deaths, models, folder, ray_cluster
):
    recipe = write_recipe(models, folder, "sound")
    layout = prepare_run(recipe)
    build_corpora(recipe, layout, report_nothing)
    tombs = folder / "tombs"
    tombs.mkdir()
    capture = partial(capture_sources, recipe, layout, report_nothing)
    dying = partial(load_dying_engine, tombs=tombs, deaths=deaths)
    if deaths > MOST_INIT_DEATHS:
        with pytest.raises(RuntimeError, match=r"6 times in a row an actor died .*/sound'; give"):
            capture(dying)
        assert len(list(tombs.iterdir())) == MOST_INIT_DEATHS + 1
        capture()
    else:
        capture(dying)
        assert len(list(tombs.iterdir())) == deaths
    assert layout.captured["sound"].is_whole()


def read_reasons(data: DataSet) -> dict[str, str]:
    folder = Path(data.store.root, data.folder, "rejects")
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return {record["name"]: record["reason"] for record in map(json.loads, lines)}


def list_captured(data: DataSet) -> dict[str, int]:
    """Return the source's tokens of each row."""
    found: dict[str, int] = {}
    for commit in data.commits().values():
        table = data.read_shard(commit)
        lengths = np.diff(flatten_column(table, "token_ids")[1])
        found |= dict(zip(table["row_id"].to_pylist(), lengths.tolist(), strict=True))
    return found


def test_hostile_documents_are_rejected_by_reason_and_every_good_row_is_there(
    models, folder, ray_cluster
):
    poison = "\u0416"  # no other document has it
    hostile = [
        ("empty", b'""'),
        ("blank", b'" \\n\\t "'),
        ("huge", json.dumps("x" * 10_000_000).encode()),
        ("binary", b'"' + bytes(range(128, 256)) * 4 + b'"'),
        ("invalid", b'"caf\xe9"'),
        ("combining", json.dumps("e" + "\u0301" * 100_000, ensure_ascii=False).encode()),
        ("nul", b'"a\\u0000b and more"'),
        ("markers", json.dumps("<|end|>" * 50).encode()),
        ("poison", json.dumps(f"{poison} is here", ensure_ascii=False).encode()),
    ]
    with open(folder / "docs.jsonl", "ab") as out:
        for name, text in hostile:
            out.write(b'\n{"id": "%s", "text": %s}' % (name.encode(), text))
    tokenizer = byte_level_tokenizer(VOCAB)
    (token, *_) = set(tokenizer.encode(poison).ids) - set(tokenizer.encode("".join(SAMPLE)).ids)
    poison_model(models / "poisoned", token)
    recipe = write_recipe(models, folder, "sound", "poisoned", max_document_bytes=1_000_000)
    layout = prepare_run(recipe)
    build_corpora(recipe, layout, report_nothing)
    capture_sources(recipe, layout, report_nothing)
    reasons = read_reasons(layout.corpus)
    # A line that is too long or no UTF-8 is never read for its id: it goes by its place.
    assert {"empty", "blank", "nul"} < set(reasons)
    assert len(reasons) == 6
    assert sum("invalid UTF-8" in reason for reason in reasons.values()) == 2
    assert sum("1000000" in reason.replace(",", "") for reason in reasons.values()) == 1
    rows = list_captured(layout.captured["sound"])
    documents = {row.partition("#")[0] for row in rows}
    good = {f"good{i}" for i in range(40)}
    assert documents == good | {"combining", "markers", "poison"}
    assert all(rows.values())
    assert not read_reasons(layout.captured["sound"])
    poisoned = list_captured(layout.captured["poisoned"])
    assert read_reasons(layout.captured["poisoned"]) == {"poison#0": NOT_FINITE}
    assert {row for row, length in poisoned.items() if not length} == {"poison#0"}
    assert list(poisoned) == list(rows)


def poison_model(folder: Path, token: int) -> None:
    """Make a model answer NaN wherever a token is read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)


CANARY = "canary5f3a9c0b7e"


def test_fault_27_no_secret_is_written_anywhere(models, folder, s3_root, s3_proxy):
    recipe = write_recipe(models, folder, "sound").model_dump(mode="json", by_alias=True)
    recipe = {name: recipe[name] for name in ("corpus", "target", "evaluate")} | {
        "storage": s3_root,
        "storage_patience_seconds": 2,
        "sources": [{"name": "sound", "model": str(models / "sound")}],
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    said = ""
    with tempfile.TemporaryDirectory(prefix="rs", dir="/tmp") as short:
        env = os.environ | {
            "AWS_SECRET_ACCESS_KEY": CANARY,
            "AWS_SESSION_TOKEN": f"{CANARY}-session",
            "RAY_TMPDIR": short,
        }
        env.pop("RAY_ADDRESS", None)
        for stages, is_gone, code in (
            (["corpus"], False, 0),
            (["capture"], False, 0),
            (["status"], False, 0),
            (["capture", "capture.top_k=3"], True, 1),
        ):
            s3_proxy.gone = is_gone
            command = str(Path(sys.executable).with_name("rayfuse"))
            done = subprocess.run(
                [command, stages[0], str(folder / "r.yaml"), *stages[1:]],
                env=env,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            s3_proxy.gone = False
            assert done.returncode == code, done.stderr[-3000:]
            said += done.stdout + done.stderr
        logs = [path for path in Path(short).rglob("*") if path.is_file()]
        assert any("raylet" in path.name for path in logs)
        assert not [path for path in logs if CANARY.encode() in path.read_bytes()]
    assert CANARY not in said
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    names = bucket.find(s3_root.removeprefix("s3://"))
    assert any("run.json" in name for name in names)
    assert not [name for name in names if CANARY.encode() in bucket.cat(name)]


@pytest.mark.parametrize("setting", ["storage", "documents"])
def test_fault_27_a_secret_in_an_address_is_refused_and_not_repeated(setting, models, folder):
    recipe = write_recipe(models, folder, "sound").model_dump(mode="json", by_alias=True)
    address = f"s3://key:{CANARY}@bucket/prefix"
    if setting == "storage":
        recipe["storage"] = address
    else:
        recipe["corpus"]["documents"] = address
    with pytest.raises(ValueError, match="credentials") as error:
        parse_recipe(recipe)
    assert CANARY not in str(error.value)
