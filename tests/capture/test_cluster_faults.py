"""Faults that capture must survive, numbered as in the fault model: those that need a cluster."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch
import yaml

from rayfuse.align.task import plan_align_step
from rayfuse.capture.actor import MAX_CRASHES
from rayfuse.capture.dtype import settle_dtype
from rayfuse.capture.engines.base import Engine, Failure, TokenRows
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import NOT_FINITE, tokenize_rows
from rayfuse.capture.scheduling import plan_work
from rayfuse.capture.stage import capture_sources
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.corpus.stage import build_corpora
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.pipeline import prepare_run
from rayfuse.runtime.progress import ProgressEvent, report_nothing
from rayfuse.storage.codec import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.rejects import Reject
from tests.chaos.runs import IS_LONG
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


class DyingEngine:
    """An engine that kills its process when it scores, as the kernel may when out of memory."""

    def __init__(self, engine: Engine, die: Callable[[], None]) -> None:
        self.engine, self.die = engine, die
        self.batch_tokens = engine.batch_tokens

    def score_rows(self, rows: TokenRows) -> list[TopLogprobs | Failure]:
        self.die()
        return self.engine.score_rows(rows)


def load_dying_engine(source: ModelSettings, settings: CaptureSettings, *, tombs: Path) -> Engine:
    """Load an engine in a process that is killed: three times in loading, then in scoring."""

    def die() -> None:
        (tombs / uuid.uuid4().hex).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if len(list(tombs.iterdir())) < 3:
        die()
    return DyingEngine(TransformersEngine(source, settings), die)


@pytest.mark.skipif(
    not IS_LONG, reason="nine processes that each load torch: minutes; RAYFUSE_LONG_CHAOS=1"
)
@pytest.mark.timeout(1800)
def test_fault_2_15_a_few_crashes_before_the_first_shard_are_tolerated_and_many_stop_the_run(
    models, folder, ray_cluster
):
    recipe = write_recipe(models, folder, "sound")
    layout = prepare_run(recipe)
    build_corpora(recipe, layout, report_nothing)
    tombs = folder / "tombs"
    tombs.mkdir()
    with pytest.raises(RuntimeError, match=r"6 times in a row an actor died .*/sound'; give"):
        capture_sources(
            recipe,
            layout,
            report_nothing,
            partial(load_dying_engine, tombs=tombs),
            then=plan_align_step,
        )
    assert len(list(tombs.iterdir())) == MAX_CRASHES + 1
    capture_sources(recipe, layout, report_nothing, then=plan_align_step)
    assert layout.captured["sound"].is_complete()


def load_slow_or_no_engine(source: ModelSettings, settings: CaptureSettings) -> Engine:
    if source.model.endswith("/poisoned"):
        raise ValueError("the model is of another family\nand more")
    time.sleep(5)
    return TransformersEngine(source, settings)


def test_a_failed_source_is_reported_at_once_and_the_others_resume_in_the_dtype_they_started_in(
    models, folder, ray_cluster
):
    recipe = write_recipe(models, folder, "sound", "poisoned")
    layout = prepare_run(recipe)
    build_corpora(recipe, layout, report_nothing)
    sound = layout.captured["sound"]
    sound.claim({})
    assert settle_dtype(sound, "auto", on_gpu=True) == "bfloat16"  # by a cluster with GPUs
    events: list[tuple[str, int, str]] = []

    def record(event: ProgressEvent) -> None:
        events.append((event.title, event.total, event.note))

    with pytest.raises(ValueError, match="of another family"):
        capture_sources(recipe, layout, record, load_slow_or_no_engine, then=plan_align_step)
    assert sound.is_complete()
    failed = events.index(("capture poisoned", 0, "stopped: the model is of another family"))
    last = max(i for i, (title, *_) in enumerate(events) if title == "capture sound")
    assert failed < last
    assert ("capture sound", 0, "resumes in bfloat16, as it started") in events
    commit = sound.read_commit(0)
    corpus = layout.corpus.read_shard(layout.corpus.read_commit(0))
    tokens = tokenize_rows(corpus, load_recipe_tokenizer(recipe.sources[0]))
    stored = flatten_column(sound.read_shard(commit), "next_logprobs")[0]
    gaps = {
        dtype: np.abs(stored - score(recipe.sources[0], dtype, tokens)).max()
        for dtype in ("float32", "bfloat16")
    }
    assert gaps["bfloat16"] < 0.1 * gaps["float32"]


def score(source: ModelSettings, dtype: str, tokens: TokenRows) -> np.ndarray:
    """Compute the log-probability of each next token, in float16 as it is stored."""
    model = source.model_copy(update={"dtype": dtype})
    engine = TransformersEngine(model, CaptureSettings(top_k=4))
    records = engine.score_rows(tokens)
    return np.concatenate([record.next_logprobs for record in records]).astype(np.float16)


def test_a_file_whose_documents_are_all_rejected_leaves_a_shard_without_rows(
    models, folder, ray_cluster
):
    (folder / "empty.jsonl").write_text('{"id": "none", "text": ""}\n')
    recipe = write_recipe(models, folder, "sound", shard_tokens=100)
    documents = [str(folder / name) for name in ("docs.jsonl", "empty.jsonl")]
    recipe = parse_recipe(
        dump_recipe(recipe) | {"corpus": dump_recipe(recipe)["corpus"] | {"documents": documents}}
    )
    layout = prepare_run(recipe)
    build_corpora(recipe, layout, report_nothing)
    assert 0 in {commit.rows for commit in layout.corpus.commits().values()}
    capture_sources(recipe, layout, report_nothing, then=plan_align_step)
    assert layout.captured["sound"].is_complete()


def test_fault_19_the_rejects_of_earlier_jobs_count(models, folder, ray_cluster):
    recipe = write_recipe(models, folder, "sound", shard_tokens=100)
    layout = prepare_run(recipe)
    build_corpora(recipe, layout, report_nothing)
    manifest = layout.corpus.read_manifest()
    assert manifest.num_shards > 4
    captured = layout.captured["sound"]
    captured.claim({})
    rejected = 0
    for shard in range(1, manifest.num_shards):
        rows = layout.corpus.read_shard(layout.corpus.read_commit(shard), columns=["row_id"])
        names = rows["row_id"].to_pylist() if shard < 4 else []
        rejected += len(names)
        rejects = [Reject(name, NOT_FINITE) for name in names]
        captured.write_shard(shard, rows, tokens=1, rejects=rejects)
    (work,), _ = plan_work(recipe, layout, report_nothing, plan_align_step)
    assert work.shards == [0]
    assert work.rejects_before == rejected > 1
    done = (manifest.num_shards - 1) / manifest.num_shards
    assert work.rows_before == pytest.approx(done * manifest.rows, abs=1)
    with pytest.raises(ValueError, match=rf"source sound: {rejected} of \d+ rows were rejected"):
        capture_sources(recipe, layout, report_nothing, then=plan_align_step)


def read_reasons(data: DataSet) -> dict[str, str]:
    folder = Path(data.store.root, data.folder, "rejects")
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return {record["name"]: record["reason"] for record in map(json.loads, lines)}


def list_captured(data: DataSet) -> dict[str, int]:
    """Count the source's tokens of each captured row."""
    found: dict[str, int] = {}
    for commit in data.commits().values():
        table = data.read_shard(commit)
        lengths = np.diff(flatten_column(table, "token_ids")[1])
        found |= dict(zip(table["row_id"].to_pylist(), lengths.tolist(), strict=True))
    return found


def test_hostile_documents_are_rejected_with_a_reason_and_every_good_row_is_captured(
    models, folder, ray_cluster
):
    poison = "\u0416"  # no other document has it
    hostile = [
        ("empty", b'""'),
        ("whitespace", b'" \\n\\t "'),
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
    capture_sources(recipe, layout, report_nothing, then=plan_align_step)
    reasons = read_reasons(layout.corpus)
    # A line that is too long or not UTF-8 is rejected before its id is parsed: its line number
    # is its name.
    assert {"empty", "whitespace", "nul"} < set(reasons)
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
    """Make a model output NaN at every position that attends to a token."""
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
        "storage_retry_seconds": 2,
        "sources": [{"name": "sound", "model": str(models / "sound")}],
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    output = ""
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
            output += done.stdout + done.stderr
        logs = [path for path in Path(short).rglob("*") if path.is_file()]
        assert any("raylet" in path.name for path in logs)
        assert not [path for path in logs if CANARY.encode() in path.read_bytes()]
    assert CANARY not in output
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    names = bucket.find(s3_root.removeprefix("s3://"))
    assert any("run.json" in name for name in names)
    assert not [name for name in names if CANARY.encode() in bucket.cat(name)]
