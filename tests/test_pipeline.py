"""The whole pipeline on a real Ray cluster: real tokenizers, real text, tiny models."""

import gzip
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

import rayfuse
from benchmarks.plain_score import compare
from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.fuse.source_filter import is_noise
from rayfuse.pipeline import STAGES, StageResult, prepare_run, run_stages
from rayfuse.run.layout import Layout
from rayfuse.runtime.progress import report_nothing
from rayfuse.storage.codec import decode_probs, flatten_column
from rayfuse.train.live import read_workers
from rayfuse.watch.snapshot import RunReader, to_values
from tests.fakes import copy_tokenizer, save_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

MODELS = {  # name: architecture, tokenizer, rows of the head (GPT-NeoX and Llama here are padded)
    "neox": ("gpt_neox", "gpt-neox-20b", 50432),
    "openllama": ("llama", "open-llama-3b", 32000),
    "gpt2": ("gpt2", "gpt2", 50257),
    "target": ("llama", "phi-3-mini", 32064),
}


@dataclass(frozen=True)
class FinishedRun:
    recipe: Recipe
    layout: Layout
    root: Path
    results: list[StageResult]


def write_documents(shared_data: Path, path: Path, part: slice) -> None:
    with open(path, "w") as out:
        for domain in ("wiki", "code", "multilingual"):
            with gzip.open(shared_data / f"corpus/{domain}/valid.jsonl.gz", "rt") as lines:
                for line in list(lines)[part]:
                    record = json.loads(line)
                    out.write(json.dumps(record | {"text": record["text"][:1500]}) + "\n")


def run_again(run: FinishedRun) -> list[StageResult]:
    results: list[StageResult] = []
    run_stages(run.recipe, run.layout, STAGES, report_nothing, results.append)
    return results


def snapshot(root: Path) -> dict[str, int]:
    files = (path for path in root.rglob("*") if path.is_file() and ".probe" not in path.name)
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files}


def spell(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.id_to_token(int(token_id)).replace("\u2581", " ").replace("<0x0A>", "\n")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, shared_data, ray_cluster) -> FinishedRun:
    root = tmp_path_factory.mktemp("run")
    for name, (family, tokenizer, width) in MODELS.items():
        save_model(family, width, root / name, tied=family == "gpt2")
        copy_tokenizer(shared_data / "tokenizers" / tokenizer, root / name)
    write_documents(shared_data, root / "corpus.jsonl", slice(0, 4))
    write_documents(shared_data, root / "held.jsonl", slice(4, 7))
    sources = [{"name": n, "model": str(root / n)} for n in MODELS if n != "target"]
    sources.append({"name": "stories", "model": str(shared_data / "models/stories260k")})
    recipe = parse_recipe(
        {
            "storage": str(root / "storage"),
            "corpus": {
                "documents": str(root / "corpus.jsonl"),
                "max_tokens": 256,
                "shard_tokens": 1500,
            },
            "target": {"model": str(root / "target")},
            "sources": sources,
            "fuse": {"skip_noise": False},  # random weights know nothing
            "train": {"rows_per_step": 16, "learning_rate": 1e-3},
            "evaluate": {"documents": str(root / "held.jsonl")},
        }
    )
    layout = prepare_run(recipe)
    results: list[StageResult] = []
    run_stages(recipe, layout, STAGES, report_nothing, results.append)
    return FinishedRun(recipe, layout, root / "storage", results)


def test_every_stage_ran_and_its_results_are_whole(finished_run):
    assert [result.stage for result in finished_run.results] == list(STAGES)
    layout = finished_run.layout
    corpus = layout.corpus.commits()
    assert len(corpus) >= 3
    for data in (*layout.captured.values(), *layout.aligned.values()):
        assert data.is_complete()
        assert sorted(data.commits()) == sorted(corpus)
    for data in layout.aligned.values():
        stats = [commit.stats for commit in data.commits().values()]
        positions = sum(each["positions"] for each in stats)
        assert sum(each["with_signal"] for each in stats) > 0.5 * positions
    for run in layout.runs:
        (worker,) = read_workers(layout.store, run.folder)
        assert (worker.rank, worker.host) == (0, socket.gethostname())


def test_the_watched_numbers_of_a_finished_run_are_those_of_status(finished_run):
    reader = RunReader(finished_run.recipe)
    snapshot = reader.read()
    while snapshot.unread:
        snapshot = reader.read()
    values, status = to_values(snapshot), rayfuse.open_run(finished_run.recipe).status()
    assert values["stages"] == status["stages"]
    assert all(values["stages"].values())
    for label, numbers in values["data_sets"].items():
        assert numbers == {key: status["data_sets"][label][key] for key in numbers}
    for run in snapshot.trainings:
        assert (run.steps, run.is_complete, run.holder) == (run.num_steps, True, None)
        shares = run.records[-1]["source_shares"]
        assert sum(shares.values()) == pytest.approx(1 if run.name == "fused" else 0)
    assert snapshot.faults == []


def test_random_weights_know_nothing_and_who_has_read_stories_alone_knows_little(finished_run):
    commits = {name: data.commits().values() for name, data in finished_run.layout.aligned.items()}
    assert all(is_noise(commits[name]) for name in ("neox", "openllama", "gpt2"))
    assert not is_noise(commits["stories"])


@pytest.mark.parametrize("method", ["exact", "min_edit_distance", "cooccurrence"])
def test_another_method_aligns_what_is_captured_without_touching_it(finished_run, method):
    values = dump_recipe(finished_run.recipe)
    recipe = parse_recipe(values | {"align": {"method": method}})
    before = snapshot(finished_run.root / "captured")
    layout = prepare_run(recipe)
    assert not any(data.is_complete() for data in layout.aligned.values())
    run_stages(recipe, layout, ("align",), report_nothing, lambda result: None)
    assert snapshot(finished_run.root / "captured") == before
    for name, data in layout.aligned.items():
        ours, theirs = (
            [commit.stats for commit in each.commits().values()]
            for each in (data, finished_run.layout.aligned[name])
        )
        signals = sum(each["with_signal"] for each in ours)
        assert signals > 0
        if method != "min_edit_distance":  # which knows nothing of bytes
            assert signals <= sum(each["with_signal"] for each in theirs)
        file = layout.map_files.get(name)
        assert (file is None) == (method == "exact")
        assert file is None or (finished_run.root / file).is_file()


def test_the_fused_model_is_a_hugging_face_folder(finished_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for run in finished_run.layout.runs:
        folder = finished_run.root / run.folder / "model"
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = AutoTokenizer.from_pretrained(folder)("The cat", return_tensors="pt").input_ids
        assert torch.isfinite(model(input_ids=ids).logits).all()
        assert list(folder.glob("*.safetensors"))
        assert not list(folder.glob("*.bin"))
        target = Path(finished_run.recipe.target.model)
        for file in target.glob("tokenizer*"):
            assert (folder / file.name).read_bytes() == file.read_bytes()
        lines = (finished_run.root / run.folder / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["clm_loss"] for line in lines]
        assert losses[-1] < losses[0]


def test_transformers_alone_gives_the_published_model_the_same_scores(finished_run):
    layout, root = finished_run.layout, finished_run.root
    fused = next(run for run in layout.runs if run.is_fused)
    found = compare(
        root / fused.folder / "model",
        root / layout.held_out.folder,
        root / layout.evaluation.scores["fused"],
    )
    assert found["documents"] == 9
    assert found["largest_relative_difference"] < 1e-5


def test_every_model_is_scored_on_every_domain(finished_run):
    scores = json.loads((finished_run.root / "report/findings.json").read_text())["bits_per_byte"]
    sources = list(finished_run.layout.captured)
    assert set(scores) == {*sources, "ensemble", "target", "clm", "fused"}
    mean = sum(scores[name]["all"] for name in sources) / len(sources)
    assert scores["ensemble"]["all"] <= mean  # Jensen: the log of a mean is above the mean log
    for by_domain in scores.values():
        assert set(by_domain) == {"all", "wiki", "code", "multilingual"}
        assert all(0 < value < 40 for value in by_domain.values())
    # The real model is far better than any random one.
    assert scores["stories"]["wiki"] < scores["gpt2"]["wiki"] + 1
    assert scores["clm"]["all"] < scores["target"]["all"]
    page = (finished_run.root / "report/index.html").read_text()
    assert "data:image/png;base64" in page
    assert len(list((finished_run.root / "report").glob("*.png"))) >= 4


def test_aligned_mass_is_what_the_real_source_model_gives_the_real_next_token(
    finished_run, shared_data
):
    """The stories model's own logits, computed here without any of our code, as a chain."""
    from transformers import AutoModelForCausalLM

    layout = finished_run.layout
    folder = shared_data / "models/stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder)
    spelled = Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus = layout.corpus.read_shard(layout.corpus.commits()[0])
    data = layout.aligned["stories"]
    aligned = data.read_shard(data.commits()[0])
    text = corpus["text"].to_pylist()[0]
    pieces = [spell(spelled, i) for i in spelled.encode(text, add_special_tokens=False).ids]
    assert "".join(pieces) == " " + text, "a row of plain ASCII"
    ids = torch.tensor([[1, *spelled.encode(text, add_special_tokens=False).ids]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].log_softmax(1)
    chain = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].double().cumsum(0)
    ends = np.cumsum([len(piece) for piece in pieces]) - 1  # the added blank is no text
    target_ids, _ = flatten_column(corpus, "target_ids")
    target_vocabulary = Tokenizer.from_file(
        str(Path(finished_run.recipe.target.model, "tokenizer.json"))
    )
    top_ids, _ = flatten_column(aligned, "top_ids")
    k = finished_run.recipe.capture.top_k
    tails = flatten_column(aligned, "tail_logprobs")[0].astype(float)
    stored = decode_probs(flatten_column(aligned, "top_logprobs")[0], top_ids.reshape(-1, k), tails)
    has_signal = aligned["has_signal"].to_pylist()[0]
    byte, checked = 0, 0
    for t in range(1, 12):
        byte += len(spell(target_vocabulary, target_ids[t])) - (t == 1)
        stop = byte + len(spell(target_vocabulary, target_ids[t + 1]))
        if not has_signal[t] or stop not in ends:
            continue
        before, after = np.flatnonzero(ends == byte)[-1], np.flatnonzero(ends == stop)[-1]
        expected = float((chain[after] - chain[before]).exp())
        entry = np.flatnonzero(top_ids.reshape(-1, k)[t] == target_ids[t + 1])
        got = float(stored[t, entry].sum())
        # Other source tokens may begin with the same target token: never less than the chain.
        assert got >= expected * 0.96 - 1e-4
        checked += 1
    assert checked >= 3


def test_a_second_run_does_nothing_in_under_ten_seconds(finished_run):
    before = snapshot(finished_run.root)
    began = time.monotonic()
    results = run_again(finished_run)
    assert time.monotonic() - began < 10
    assert all(result.was_done for result in results)
    assert snapshot(finished_run.root) == before


def test_a_lost_captured_shard_is_made_again_and_nothing_else(finished_run):
    data = finished_run.layout.captured["openllama"]
    lost = data.commits()[1]
    path = finished_run.root / data.folder / lost.file
    table = pq.read_table(path)
    os.remove(path)
    before = snapshot(finished_run.root)
    results = run_again(finished_run)
    assert [r.stage for r in results if not r.was_done] == ["capture"]
    made = data.commits()[1]
    assert made.attempt != lost.attempt
    assert pq.read_table(finished_run.root / data.folder / made.file).equals(table)
    changed = {
        name for name, stamp in snapshot(finished_run.root).items() if before.get(name) != stamp
    }
    manifest = data.read_manifest()
    assert manifest is not None
    assert changed == {
        f"{data.folder}/{made.file}",
        f"{data.folder}/commits/00001.json",
        f"{data.folder}/manifest.json",
        f"{data.folder}/{manifest.records}",
        f"{data.folder}/metrics.jsonl",
    }
