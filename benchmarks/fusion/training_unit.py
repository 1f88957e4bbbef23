"""One training of the study: the target on a corpus, with sources, rivals' losses or a trial."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.fusion.alignments import align_tokenizers
from benchmarks.fusion.full import iterate_full_steps, place_full_source
from benchmarks.fusion.planner import COPY
from benchmarks.fusion.rivals import RivalModel
from benchmarks.fusion.stored import (
    Record,
    data_of,
    load,
    read_captured,
    read_rows,
    save,
    score_lm,
    tokenizer_of,
)
from benchmarks.fusion.training import PACKING, train_lm
from benchmarks.fusion.trials import (
    MovingAverage,
    Trial,
    add_dropout,
    iterate_trial_steps,
    plan_trial_steps,
    read_trial_rows,
)
from benchmarks.fusion.units import Unit
from benchmarks.fusion.written import iterate_mixed_steps
from rayfuse.config.fuse import FuseSettings
from rayfuse.config.train import TrainSettings
from rayfuse.fuse.reader import ShardReader
from rayfuse.train.batches import MicroBatch, StepPlan, iterate_steps
from rayfuse.train.order import count_steps


def train_target(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
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
                align_tokenizers(need, out, table),
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
