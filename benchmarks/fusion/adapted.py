"""Sources that are trained on the corpus first, cross-fitted: no source scores text it has seen.

The corpus' documents are divided into folds. A source is trained on all folds but one, and captured
on that one; the records of all folds make one data set, as of a single source.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from benchmarks.fusion.planner import FOLDS
from benchmarks.fusion.stored import (
    BATCH_TOKENS,
    Record,
    data_of,
    load,
    model_folder,
    read_rows,
    save,
    tokenizer_of,
)
from benchmarks.fusion.training import PACKING, train_lm
from benchmarks.fusion.units import Unit
from rayfuse.capture.engines.base import Failure
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.config.train import TrainSettings
from rayfuse.fuse.reader import FusedRows
from rayfuse.fuse.rules import make_empty
from rayfuse.train.batches import MicroBatch, build_micro_batches


def fold_of_rows(corpus: pa.Table) -> Int[np.ndarray, " rows"]:
    """Assign each row to a fold, by its document."""
    return np.array(
        [
            int.from_bytes(hashlib.sha256(f"fold:{doc_id}".encode()).digest()[:4], "big") % FOLDS
            for doc_id in corpus["doc_id"].to_pylist()
        ]
    )


def adapt_model(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Train a source on the rows outside of a fold."""
    del data
    settings, start = unit.settings, unit.needs["start"]
    corpus = read_rows(unit.needs["corpus"], out)
    tokenizer = tokenizer_of(start.needs["tokenizer"], out)
    rows = tokenize_rows(corpus, tokenizer)
    seen = np.flatnonzero(fold_of_rows(corpus) != settings["fold"])
    random = np.random.default_rng(settings["seed"])
    size = settings["rows_per_step"]
    parts = [
        order[first : first + size]
        for order in (random.permutation(seen) for _ in range(settings["epochs"]))
        for first in range(0, len(order), size)
    ]
    steps = [_lay_out([rows[number] for number in part]) for part in parts]
    lm = load(start, out)
    train = TrainSettings(clm_weight=1.0, **settings["train"])
    losses = train_lm(lm, steps, train, num_steps=len(steps))
    save(lm, start.needs["tokenizer"], folder, out)
    return {"losses": losses, "rows": len(seen)}


def _lay_out(rows: list[Int[np.ndarray, " _"]]) -> list[MicroBatch]:
    """Build the micro-batches of rows of plain text."""
    ids = np.concatenate(rows).astype(np.int32)
    lengths = np.array([len(row) for row in rows])
    selected = np.full(len(ids), -1, dtype=np.int16)
    return build_micro_batches(FusedRows(ids, lengths, make_empty(len(ids)), selected), PACKING)


def capture_folds(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Score the rows of each fold with the source that has not seen them."""
    del folder, data
    settings, tokenizer = unit.settings, tokenizer_of(unit.needs["model"].needs["tokenizer"], out)
    corpus = read_rows(unit.needs["corpus"], out)
    rows, folds = tokenize_rows(corpus, tokenizer), fold_of_rows(corpus)
    capture = CaptureSettings(**settings["capture"], batch_tokens=BATCH_TOKENS)
    found: dict[int, TopLogprobs | Failure] = {}
    for fold in range(FOLDS):
        adapted = unit.needs[f"adapted {fold}"]
        source = ModelSettings(model=str(model_folder(adapted, out)), dtype="float32")
        numbers = np.flatnonzero(folds == fold).tolist()
        scored = TransformersEngine(source, capture).score_rows(
            [rows[number] for number in numbers]
        )
        found |= dict(zip(numbers, scored, strict=True))
    (name,) = settings["records"]
    records = [found[number] for number in range(len(rows))]
    table, rejects = build_captured(corpus, rows, records, tokenizer.eos_id)
    data_of(unit, out, name).write_shard(0, table, tokens=sum(map(len, rows)))
    return {"rejects": len(rejects)}
