"""The computation of each kind of unit, with rayfuse's own parts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.fusion.adapted import adapt_model, capture_folds
from benchmarks.fusion.alignments import align_tokenizers
from benchmarks.fusion.costs import measure_costs
from benchmarks.fusion.cut_tokenizers import cut_tokenizer
from benchmarks.fusion.filter import filter_sources
from benchmarks.fusion.published import teach_current_token
from benchmarks.fusion.records import keep_fewer
from benchmarks.fusion.scales import DOMAINS
from benchmarks.fusion.stored import (
    BATCH_TOKENS,
    Record,
    choose_device,
    data_of,
    load,
    load_folder,
    model_folder,
    read_rows,
    save,
    score_lm,
    sum_documents,
    tokenizer_of,
)
from benchmarks.fusion.text import (
    HALVES,
    read_domain,
    read_fusion,
    read_held_out,
    read_pretraining,
)
from benchmarks.fusion.training import lay_out_text, train_lm
from benchmarks.fusion.training_unit import train_target
from benchmarks.fusion.units import Unit
from benchmarks.fusion.written import gather_texts, write_texts
from rayfuse.align.shard import align_shard
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.config.train import TrainSettings
from rayfuse.corpus.shards import build_rows
from rayfuse.demo.specs import ModelSpec
from rayfuse.demo.text import Document as PlainDocument
from rayfuse.demo.tiny_models import build_model, draw_rows
from rayfuse.evaluate.bits_per_byte import score_tokens
from rayfuse.evaluate.ensemble import TokenNLL, average_sources
from rayfuse.evaluate.merged_weights import average_weights
from rayfuse.models.causal_lm import split_head

COUNTED_DOCUMENTS = 200
"""Training documents per domain that decide the characters of a truncated tokenizer."""


def work(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Compute a unit, and return its record."""
    return KINDS[unit.kind](unit, folder, out, data)


def _make_tokenizer(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    texts = [
        document.text
        for domain in DOMAINS
        for document in read_domain(data, domain, "train")[:COUNTED_DOCUMENTS]
    ]
    name, vocab_size = unit.settings["source"], unit.settings["vocab_size"]
    cut_tokenizer(data / "tokenizers" / name, folder / "tokenizer", texts, vocab_size)
    return {"vocab_size": tokenizer_of(unit, out).vocab_size}


def _make_model(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Pre-train a model from scratch, or continue another one."""
    settings, tokenizer = unit.settings, tokenizer_of(unit.needs["tokenizer"], out)
    rows_per_step = settings["rows_per_step"]
    spec = ModelSpec(
        name=unit.name,
        family=settings["family"],
        tokenizer="byte_level",
        vocab_size=tokenizer.vocab_size,
        head_width=tokenizer.vocab_size,
        width=settings["width"],
        layers=settings["layers"],
        shares=tuple((domain, share) for domain, share in settings["shares"]),
        steps=settings["tokens"] // (rows_per_step * settings["max_tokens"]),
        rows_per_step=rows_per_step,
        context_tokens=settings["max_tokens"],
        head_size=settings["head_size"],
    )
    if "start" in unit.needs:
        lm = load(unit.needs["start"], out)
    else:
        model = build_model(spec, tokenizer, settings["seed"]).to(choose_device())
        lm = split_head(model, name=unit.name)
    losses: list[float] = []
    if spec.steps:
        documents = [
            PlainDocument(document.doc_id, document.domain, document.text)
            for document in read_pretraining(
                data, settings["seed"], split_seed=settings.get("split_seed")
            )
        ]
        rows = draw_rows(spec, documents, tokenizer, settings["seed"])
        steps = lay_out_text(rows, rows_per_step)
        num_steps = -(-len(rows) // rows_per_step)
        train = TrainSettings(clm_weight=1.0, **settings["train"])
        losses = train_lm(lm, steps, train, num_steps=num_steps)
    save(lm, unit.needs["tokenizer"], folder, out)
    parameters = sum(weights.numel() for weights in lm.model.parameters())
    return {"losses": losses, "parameters": parameters}


def _make_corpus(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    settings = unit.settings
    documents = read_fusion(
        data,
        settings["seed"],
        settings["bytes_per_domain"],
        settings["chars"],
        split_seed=settings.get("split_seed"),
    )
    tokenizers = [tokenizer_of(need, out) for need in unit.needs.values()]
    table = build_rows(documents, tokenizers[0], tokenizers, max_tokens=settings["max_tokens"])
    tokens = sum(len(ids) for ids in table["target_ids"])
    data_of(unit, out, "rows").write_shard(0, table, tokens=tokens)
    num_bytes = int(np.sum(table["num_bytes"].to_numpy()))
    return {
        "rows": table.num_rows,
        "documents": len(documents),
        "tokens": tokens,
        "bytes": num_bytes,
    }


def _make_held_out(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    settings = unit.settings
    tokenizers = [tokenizer_of(need, out) for need in unit.needs.values()]
    found: Record = {}
    for shard, half in enumerate(HALVES):
        documents = read_held_out(
            data,
            half,
            max_documents=settings["documents"],
            max_chars=settings["chars"],
            has_reserve="split_seed" in settings,
        )
        table = build_rows(documents, tokenizers[0], tokenizers, max_tokens=settings["max_tokens"])
        data_of(unit, out, "rows").write_shard(shard, table, tokens=0)
        found[half] = [
            [document.doc_id, document.domain, len(document.text.encode())]
            for document in documents
        ]
    return found


def _capture(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Score the corpus once at the largest k, and store the records of every smaller k too."""
    settings, model = unit.settings, unit.needs["model"]
    tokenizer = tokenizer_of(model.needs["tokenizer"], out)
    corpus = read_rows(unit.needs["corpus"], out)
    rows = tokenize_rows(corpus, tokenizer)
    capture = CaptureSettings(**settings["capture"], batch_tokens=BATCH_TOKENS)
    source = ModelSettings(model=str(model_folder(model, out)), dtype="float32")
    records = TransformersEngine(source, capture).score_rows(rows)
    found: Record = {}
    for name, top_k in settings["records"].items():
        kept = [record if top_k is None else keep_fewer(record, top_k) for record in records]
        table, rejects = build_captured(corpus, rows, kept, tokenizer.eos_id)
        commit = data_of(unit, out, name).write_shard(0, table, tokens=sum(map(len, rows)))
        found[name] = {
            "bytes_per_token": commit.num_bytes / commit.tokens,
            "rejects": len(rejects),
        }
    return {"records": found}


def _align(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    captured, settings = unit.needs["captured"], unit.settings
    corpus = read_rows(unit.needs["corpus"], out)
    alignment = align_tokenizers(unit, out, corpus)
    found = data_of(captured, out, settings["record"])
    table, stats = align_shard(corpus, found.read_shard(found.read_commit(0)), alignment)
    if settings["teaches_current_token"]:
        table = teach_current_token(corpus, table)
    tokens = int(stats["positions"])
    data_of(unit, out, "rows").write_shard(0, table, tokens=tokens, stats=stats)
    return {"stats": stats}


def _score(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    model = unit.needs["model"]
    tokenizer = tokenizer_of(model.needs["tokenizer"], out)
    return score_lm(load(model, out), tokenizer, unit.needs["held_out"], out)


def _measure_costs(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    del folder
    return measure_costs(unit, out, data)


def _merge(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Score the model of averaged weights of models that have one shape."""
    models = [need for need in unit.needs.values() if need.kind == "model"]
    merged = folder / "model"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    average_weights([model_folder(model, out) for model in models], merged)
    lm = load_folder(merged)
    tokenizer = tokenizer_of(models[0].needs["tokenizer"], out)
    return score_lm(lm, tokenizer, unit.needs["held_out"], out)


def _ensemble(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Score the ensemble of the models' probabilities of the same bytes.

    The models have equal weights, or with a `switch_rate` those of `filter_sources`.
    """
    rows = data_of(unit.needs["held_out"], out, "rows")
    tables = [rows.read_shard(rows.read_commit(shard)) for shard in range(len(HALVES))]
    token_nll: list[list[list[TokenNLL]]] = [[] for _ in HALVES]
    for model in unit.needs.values():
        if model.kind == "model":
            tokenizer = tokenizer_of(model.needs["tokenizer"], out)
            lm = load(model, out)
            for found, table in zip(token_nll, tables, strict=True):
                settings = {"name": model.name, "batch_tokens": BATCH_TOKENS}
                found.append(score_tokens(lm, tokenizer, table, **settings))
    switch_rate = unit.settings.get("switch_rate")
    nats = [
        filter_sources(found, table["doc_id"].to_pylist(), switch_rate)
        if switch_rate is not None
        else np.array([average_sources(row).nats.sum() for row in zip(*found, strict=True)])
        for found, table in zip(token_nll, tables, strict=True)
    ]
    return {
        "nats": {
            half: sum_documents(table, row_nats)
            for half, table, row_nats in zip(HALVES, tables, nats, strict=True)
        }
    }


KINDS: dict[str, Callable[[Unit, Path, Path, Path], Record]] = {
    "tokenizer": _make_tokenizer,
    "model": _make_model,
    "corpus": _make_corpus,
    "adapted": adapt_model,
    "captured_folds": capture_folds,
    "written": write_texts,
    "written_corpus": gather_texts,
    "held_out": _make_held_out,
    "captured": _capture,
    "aligned": _align,
    "train": train_target,
    "score": _score,
    "costs": _measure_costs,
    "merge": _merge,
    "ensemble": _ensemble,
}
