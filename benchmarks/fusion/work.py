"""The computation of each kind of unit, with rayfuse's own parts."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.fusion.adapted import adapt_model, capture_folds
from benchmarks.fusion.costs import measure_costs
from benchmarks.fusion.cut_tokenizers import cut_tokenizer
from benchmarks.fusion.filter import filter_sources
from benchmarks.fusion.full import iterate_full_steps, place_full_source
from benchmarks.fusion.plan import UNFINISHED, WHOLE_CHARACTERS
from benchmarks.fusion.planner import COPY
from benchmarks.fusion.published import teach_current_token
from benchmarks.fusion.records import keep_fewer
from benchmarks.fusion.rivals import RivalModel
from benchmarks.fusion.scales import DOMAINS
from benchmarks.fusion.stored import (
    BATCH_TOKENS,
    Record,
    choose_device,
    data_of,
    load,
    load_folder,
    model_folder,
    read_captured,
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
from benchmarks.fusion.training import PACKING, lay_out_text, train_lm
from benchmarks.fusion.trials import (
    MovingAverage,
    Trial,
    add_dropout,
    iterate_trial_steps,
    plan_trial_steps,
    read_trial_rows,
)
from benchmarks.fusion.units import Unit
from benchmarks.fusion.written import gather_texts, iterate_mixed_steps, write_texts
from rayfuse.align.method import Alignment, build_alignment
from rayfuse.align.methods.cooccurrence import choose_most_matched, count_pairs
from rayfuse.align.methods.min_edit_distance import map_to_nearest
from rayfuse.align.shard import align_shard
from rayfuse.align.token_spans import list_token_bytes
from rayfuse.align.vocab_map import (
    UNCHANGED,
    build_maps,
    find_unfinished,
    map_vocabulary,
)
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.fuse import FuseSettings
from rayfuse.config.models import ModelSettings
from rayfuse.config.train import TrainSettings
from rayfuse.corpus.shards import build_rows
from rayfuse.demo.specs import ModelSpec
from rayfuse.demo.text import Document as PlainDocument
from rayfuse.demo.tiny_models import build_model, draw_rows
from rayfuse.evaluate.bits_per_byte import score_tokens
from rayfuse.evaluate.ensemble import TokenNLL, average_sources
from rayfuse.evaluate.merged_weights import average_weights
from rayfuse.fuse.reader import ShardReader
from rayfuse.models.causal_lm import split_head
from rayfuse.train.batches import MicroBatch, StepPlan, iterate_steps
from rayfuse.train.order import count_steps

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
    alignment = _alignment(unit, out, corpus)
    found = data_of(captured, out, settings["record"])
    table, stats = align_shard(corpus, found.read_shard(found.read_commit(0)), alignment)
    if settings["teaches_current_token"]:
        table = teach_current_token(corpus, table)
    tokens = int(stats["positions"])
    data_of(unit, out, "rows").write_shard(0, table, tokens=tokens, stats=stats)
    return {"stats": stats}


def _alignment(unit: Unit, out: Path, corpus: pa.Table) -> Alignment:
    method = unit.settings["method"]
    source = tokenizer_of(unit.needs["captured"].needs["model"].needs["tokenizer"], out)
    target = tokenizer_of(unit.needs["corpus"].needs["target"], out)
    name = "bytes" if method in (WHOLE_CHARACTERS, UNFINISHED) else method
    maps = None
    if name == "min_edit_distance":
        maps = build_maps(map_to_nearest(range(source.vocab_size), source, target), source, target)
    if name == "cooccurrence":
        unseen = map_vocabulary(source, target)[UNCHANGED, :-1]
        counted = count_pairs(corpus, list_token_bytes(source), list_token_bytes(target))
        maps = build_maps(choose_most_matched(counted, unseen), source, target)
    alignment = build_alignment(source, target, name, maps)
    if method == WHOLE_CHARACTERS:
        alignment.maps[:, :-1][
            :, [_ends_inside_character(token) for token in source.token_bytes]
        ] = -1
    if method == UNFINISHED:
        goals = target.list_by_bytes()
        for token_id, token in enumerate(spelled or b"" for spelled in source.token_bytes):
            begun = [goals[token[:n]] for n in range(len(token), 0, -1) if token[:n] in goals]
            if begun and find_unfinished(token) < len(token):
                alignment.maps[:, token_id] = begun[0]
    return alignment


def _ends_inside_character(spelled: bytes | None) -> bool:
    """Check that a token ends inside a character, so that more bytes of it must follow."""
    try:
        (spelled or b"").decode()
    except UnicodeDecodeError:
        return True
    return False


def _train(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Continue the target on a corpus with the unit's sources, and score it."""
    settings, corpus = unit.settings, unit.needs["corpus"]
    tokenizer = tokenizer_of(corpus.needs["target"], out)
    aligned, reader = _open_reader(unit, corpus, out)
    train = TrainSettings(**settings["train"])
    rows_per_step, epochs = settings["rows_per_step"], settings.get("epochs", 1)
    plan = StepPlan(settings["seed"], epochs, rows_per_step)
    rival_name = settings.get("loss")
    trial = Trial(**settings.get("trial", {}))
    lm, rival, average, num_steps = load(unit.needs["start"], out), None, None, 0
    if settings["full"]:
        table = read_rows(corpus, out)
        sources = [
            place_full_source(
                load(need.needs["captured"].needs["model"], out),
                _alignment(need, out, table),
                table,
                read_captured(need, out),
                is_mapped=rival_name is None,
            )
            for need in aligned.values()
        ]
        if rival_name is not None:
            rival = RivalModel(lm, rival_name, [source.alignment for source in sources])
        steps = iterate_full_steps(reader, sources, plan)
    elif "written" in unit.needs:
        rows_per_step //= 2  # of the corpus
        written = _open_reader(unit, unit.needs["written"], out)[1]
        steps = iterate_mixed_steps(reader, written, plan, learns_labels=not train.is_fused)
    elif trial != Trial():
        copy = _open_reader(unit, corpus, out, COPY)[1] if trial.copy_share else None
        rows = read_trial_rows(reader, copy, trial)
        planned = plan_trial_steps(rows, read_rows(corpus, out), plan, trial)
        num_steps = len(planned)
        steps = iterate_trial_steps(rows, planned, trial, plan.seed)
        add_dropout(lm, trial.dropout)
        average = MovingAverage(lm.model, trial.average) if trial.average else None
    else:
        steps = _iterate_batches(reader, plan)
    losses = train_lm(
        lm,
        steps,
        train,
        num_steps=num_steps or count_steps(sum(reader.rows_per_shard), rows_per_step, epochs),
        source_names=reader.names,
        unigram=reader.unigram,
        rival=rival,
        after_step=None if average is None else average.update,
    )
    if average is not None:
        average.replace_weights()
    save(lm, corpus.needs["target"], folder, out)
    return {"losses": losses} | score_lm(lm, tokenizer, unit.needs["held_out"], out)


def _open_reader(
    unit: Unit, corpus: Unit, out: Path, only: str | None = None
) -> tuple[dict[str, Unit], ShardReader]:
    """Open a corpus of a training with the sources that are aligned with it, or with one alone."""
    aligned = {
        name: need
        for name, need in unit.needs.items()
        if need.kind == "aligned"
        and need.needs["corpus"].key == corpus.key
        and (name != COPY if only is None else name == only)
    }
    return aligned, ShardReader(
        data_of(corpus, out, "rows"),
        {name: data_of(need, out, "rows") for name, need in aligned.items()},
        FuseSettings(**{"skip_noise": False} | unit.settings["fuse"]),
        tokenizer_of(corpus.needs["target"], out).count_bytes(),
    )


def _iterate_batches(reader: ShardReader, plan: StepPlan) -> Iterator[list[MicroBatch]]:
    for step in iterate_steps(reader, PACKING, plan, rank=0, num_workers=1):
        yield step.batches


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
    "train": _train,
    "score": _score,
    "costs": _measure_costs,
    "merge": _merge,
    "ensemble": _ensemble,
}
