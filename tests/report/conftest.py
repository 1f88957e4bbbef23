"""A finished run of three sources, made up, with hostile names in it."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.scores import DocumentScore, Evaluation, compare_evaluations, find_role
from rayfuse.evaluate.task_scores import SubtaskScore, TaskScore, compare_tasks
from rayfuse.report.gather import Curve, Findings, SourceSelection, SourceSignal, StageCount
from rayfuse.report.overlap import Overlap
from rayfuse.report.spans import ShardSpan
from rayfuse.run.layout import EvaluationFiles, Layout, Merge, TrainRun
from rayfuse.run.prepare import SplitDocuments
from rayfuse.run.segmentation import Segmentation
from rayfuse.schema import ALIGNED, CORPUS
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import hash_bytes, write_record
from rayfuse.storage.rejects import Reject
from rayfuse.storage.store import Store, open_store

HOSTILE = '<script>alert("x")</script> | $\\frac [/b]'
DOMAINS = ("books", "code", "math", HOSTILE, "web", "wiki")
COSTS = {"big": 0.98, "coder": 1.15, "small": 1.15, "ensemble": 1.09, "merged": 1.4, "target": 1.10,
         "clm": 1.05, "fused": 1.03}  # fmt: skip
"""Bits per byte of the made-up models, about."""

GAPS = {("coder", "code"): -0.3, ("coder", "math"): -0.12, ("fused", "code"): -0.1,
        ("fused", "wiki"): 0.02, ("small", "web"): -0.2}  # fmt: skip
"""What a model does better or worse in a domain."""

LN2 = float(np.log(2))


def make_task_score(name: str, task: str, chance: float, *, is_cost: bool = False) -> TaskScore:
    draw = np.random.default_rng(sum(name.encode()))
    values = draw.binomial(1, chance, 200).astype(float)
    metric = "bits_per_byte" if is_cost else "acc"
    subtask = SubtaskScore(
        task,
        metric,
        not is_cost,
        float(values.mean()),
        tuple(f"q{i}" for i in range(200)),
        tuple(values.tolist()),
        (1.0,) * 200,
    )
    return TaskScore(name, task, (subtask,), 2.0)


CHANCES = {"big": 0.45, "coder": 0.5, "ensemble": 0.6, "target": 0.4, "clm": 0.5, "fused": 0.8}
TASKS = {
    "choose": {name: make_task_score(name, "choose", each) for name, each in CHANCES.items()},
    HOSTILE: {
        name: make_task_score(name, HOSTILE, each, is_cost=True)
        for name, each in CHANCES.items()
        if name != "ensemble"
    },
}
"""Fused is best where more is better and worst where it is a cost, which the ensemble lacks."""


def make_evaluation(name: str, cost: float, *, documents_per_domain: int = 30) -> Evaluation:
    draw = np.random.default_rng(0)  # every model meets the same documents
    own = np.random.default_rng(sum(name.encode()))
    documents = [
        DocumentScore(
            f"{domain}-{i}",
            domain,
            1000,
            float(
                LN2
                * 1000
                * (cost + GAPS.get((name, domain), 0.0) + draw.normal(0, 0.2) + own.normal(0, 0.03))
            ),
        )
        for domain in DOMAINS
        for i in range(documents_per_domain)
    ]
    return Evaluation(name, find_role(name), f"models/{name}", documents, 12.5)


def make_curve(seed: int, loss: float) -> Curve:
    number = 200
    draw = np.random.default_rng(seed)
    decay = np.exp(-np.arange(number) / 30.0)
    clm = 3.0 + 1.5 * decay + np.random.default_rng(0).normal(0, 0.05, number)
    clm = clm + (loss - 3.0) * (1 - decay) + draw.normal(0, 0.01, number)
    fusion = 0.8 + decay + draw.normal(0, 0.02, number) if loss < 3 else np.full(number, np.nan)
    steps = np.arange(1, number + 1)
    return Curve(steps, steps * 65_536, clm, fusion, np.full(number, 1.25))


@pytest.fixture(scope="session")
def findings() -> Findings:
    """Make findings in which fused is better than all but the source `big`."""
    evaluations = {name: make_evaluation(name, cost) for name, cost in COSTS.items()}
    fused = evaluations["fused"]
    counts = {
        domain: {"big": 900 - 100 * i, "coder": 200 * i, "small": 40}
        for i, domain in enumerate(DOMAINS)
    }
    return Findings(
        evaluations=evaluations,
        differences={
            name: compare_evaluations(fused, other, samples=300, seed=0)
            for name, other in evaluations.items()
            if name != "fused"
        },
        curves={"fused": make_curve(1, 2.95), "clm": make_curve(2, 3.0)},
        selection=SourceSelection(counts, unscored_rows=3, shards_read=64, num_shards=112),
        signals={
            "big": SourceSignal(1000, 860, 0.05, 0.03),
            "coder": SourceSignal(1000, 790, 0.09, 0.04),
            "small": SourceSignal(1000, 1000, 0.06, 0.06),
        },
        spans={
            "big": [ShardSpan("w", 100.0 * i, 90.0, 10.0, 5000) for i in range(1, 9)],
            "coder": [],
        },
        counts=[StageCount("corpus", 12_000, 9_000_000, 17), StageCount("held-out", 180, 90, 0)],
        task_scores=TASKS,
        task_differences={
            task: {
                name: compare_tasks(by_model["fused"], other, samples=300, seed=0)
                for name, other in by_model.items()
                if name != "fused"
            }
            for task, by_model in TASKS.items()
        },
        merge=Merge(excluded={"big": "its model_type is 'mpt', not 'llama'"}),
        overlap=Overlap(180, 2, 16, 112),
        task_overlap={"arc_easy": Overlap(50, 1, 16, 112)},
        task_overlap_fault=None,
    )


@pytest.fixture(scope="session")
def winning(findings: Findings) -> Findings:
    """Make findings without the source that is better than fused."""
    evaluations = {name: each for name, each in findings.evaluations.items() if name != "big"}
    differences = {name: each for name, each in findings.differences.items() if name != "big"}
    return replace(findings, evaluations=evaluations, differences=differences)


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return parse_recipe(
        {
            "storage": str(tmp_path / "store"),
            "corpus": {"documents": "text/<b>*.jsonl"},
            "target": {"model": "some/target", "revision": "abc123"},
            "sources": [{"name": name, "model": f"some/{name}"} for name in ("big", "coder")],
            "evaluate": {"bootstrap_samples": 100},
        }
    )


def make_corpus(rows: range, domains: list[str]) -> pa.Table:
    columns = {
        "row_id": [f"d{i}#0" for i in rows],
        "doc_id": [f"d{i}" for i in rows],
        "domain": domains,
        "text": ["x" * 10] * len(rows),
        "num_bytes": [10] * len(rows),
        "ends_document": [True] * len(rows),
        "target_ids": [[1, 2]] * len(rows),
    }
    return pa.Table.from_pydict(columns, schema=CORPUS)


def make_aligned(rows: range, nats: list[float]) -> pa.Table:
    empty = [[]] * len(rows)
    columns = dict.fromkeys(ALIGNED.names, empty)
    columns |= {
        "row_id": [f"d{i}#0" for i in rows],
        "nats": nats,
        "num_tokens": [1 for _ in rows],
    }
    return pa.Table.from_pydict(columns, schema=ALIGNED)


def make_data(store: Store, stage: str, name: str, tables: list[pa.Table], **shard) -> DataSet:
    data = DataSet(store, stage, name, "0")
    data.claim({})
    for index, table in enumerate(tables):
        data.write_shard(index, table, tokens=table.num_rows, **shard)
    data.finish(len(tables))
    return data


@pytest.fixture
def layout(recipe: Recipe) -> Layout:
    """Return a run that is done but for its report: two shards of four rows, two sources."""
    store = open_store(recipe.storage)
    shards = [range(0, 2), range(2, 4)]
    corpus = make_data(
        store,
        "corpus",
        "",
        [make_corpus(shards[0], ["wiki", "code"]), make_corpus(shards[1], ["code", "code"])],
        rejects=[Reject("d9", "empty")],
    )
    nats = {"big": [[1.0, 9.0], [3.0, np.inf]], "coder": [[2.0, 8.0], [3.0, np.inf]]}
    stats = {"positions": 10.0, "with_signal": 8.0, "tail_mass": 2.0, "captured_tail_mass": 1.0}
    aligned = {
        name: make_data(
            store,
            "aligned",
            name,
            [make_aligned(rows, each) for rows, each in zip(shards, values, strict=True)],
            stats=stats,
        )
        for name, values in nats.items()
    }
    runs = (
        TrainRun("fused", "train/fused-0", "0", True),
        TrainRun("clm", "train/clm-0", "1", False),
    )
    names = ("big", "coder", "target", "fused", "clm", "ensemble", "merged")
    evaluations = {name: f"evaluate/{name}-0.json" for name in names}
    for name, file in evaluations.items():
        store.write(file, make_evaluation(name, COSTS[name]).to_json())
    line = (
        '{"step": %d, "loss": 1, "clm_loss": %f, "fusion_loss": %s, "tokens": %d, "seconds": 1}\n'
    )
    fused = "".join(line % (step, 3.0 - step, 0.5 / step, 100 * step) for step in (1, 2, 2, 3))
    clm = "".join(line % (step, 3.5 - step, "null", 100 * step) for step in (1, 2, 3))
    for folder, lines in (("train/fused-0", fused.encode()), ("train/clm-0", clm.encode())):
        store.write(f"{folder}/metrics.jsonl", lines)
        done = {"metrics.jsonl": hash_bytes(lines)}
        write_record(store, f"{folder}/done.json", {"inputs": {}}, done)
    segmentation = Segmentation("0", "corpus/segmentation-0.json", (), (), is_reused=False)
    documents = SplitDocuments((), segmentation)
    return Layout(
        store=store,
        corpus=corpus,
        corpus_documents=documents,
        held_out=corpus,
        held_out_documents=documents,
        captured=aligned,
        aligned=aligned,
        map_files={},
        runs=runs,
        evaluation=EvaluationFiles(scores=evaluations),
    )
