"""When does fusion pay? The same models in several situations of text and strength.

    python -m benchmarks.fusion.regimes --out DIR [--regimes R0 R1 ...] [--seeds 2 3 4]

R0 is the study's own situation, R1 a small corpus and strong sources, R2 a weak target on the same
corpus, R4 strong sources and ample text. Settings are chosen on the first seed and the selection
half alone: the public validation text, on which earlier choices were made too. The reported half is
text that is reserved for it: no model is trained on it. Results are stored as by
`benchmarks.fusion`, so that a killed run resumes.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.fusion.plan import CLM, Planner
from benchmarks.fusion.scales import SCALES, Scale, Size
from benchmarks.fusion.units import Unit, run_units
from benchmarks.fusion.work import work

SEEDS = (2, 3, 4)
"""Seed 1 was used up by trials."""

STRONG = Size(192, 3, 2_000_000)
SMALL = replace(
    SCALES["cpu"],
    source=STRONG,
    corpus_bytes=32_000,
    multiples=(2, 4, 8),
    held_out_documents=10_000,
    seeds=SEEDS,
)

REGIMES: dict[str, Scale] = {
    "R0": replace(SCALES["cpu"], held_out_documents=10_000, seeds=SEEDS),
    "R1": SMALL,
    "R2": replace(SMALL, target=replace(SMALL.target, tokens=SMALL.weak_target_tokens)),
    "R4": replace(SMALL, corpus_bytes=457_000, multiples=()),
}

EPOCHS = (1, 2, 4, 8, 16)
DECAYS = (0.1, 0.4, 1.6)
"""Weight decay, also of CLM: heavy decay delays overfitting (arXiv 2509.14786)."""

LOW_LAMBDA = 0.3

Variants = Mapping[str, Unit]


def plan_regime(scale: Scale, seed: int) -> dict[str, Variants]:
    """Plan the variants of one seed of a regime by question."""
    planner = Planner(scale, seed, has_reserve=True)
    sources, held_out = planner.sources, {"held_out": planner.held_out}
    copy = {"copy": planner.target}
    full = {
        f"full, lambda {weight:g}, {epochs} epochs": planner.train(
            "full", sources, full=True, clm_weight=weight, epochs=epochs
        )
        for weight in (0.0, 0.1, 0.3)
        for epochs in (4,)
    }
    return {
        "models": {
            "target": planner.score(planner.target),
            **{name: planner.score(source) for name, source in sources.items()},
            "ensemble": Unit("ensemble", f"sources, seed {seed}", {}, sources | held_out),
        },
        "CLM": {
            f"CLM, {epochs} epochs, decay {decay:g}": planner.train(
                CLM, {}, epochs=epochs, weight_decay=decay
            )
            for epochs in EPOCHS
            for decay in DECAYS
            if decay == DECAYS[0] or epochs in (4, 8)
        },
        "text": {
            f"CLM, {times}x the text, {epochs} epochs": planner.train(
                f"{times}x", {}, times=times, epochs=epochs
            )
            for times in scale.multiples
            for epochs in (2, 4)
        },
        "defaults": {
            f"defaults, {epochs} epochs": planner.train("defaults", sources, epochs=epochs)
            for epochs in (1, 4, 8)
        },
        "copy": {
            f"copy, lambda {LOW_LAMBDA:g}, {epochs} epochs": _train_low(planner, copy, epochs)
            for epochs in (8,)
        },
        "sampled": {
            f"sampled 8+8, lambda {LOW_LAMBDA:g}, {epochs} epochs": _train_low(
                planner, sources, epochs, align={"record": "sampled-8+8"}
            )
            for epochs in (8, 16)
        },
        "fill": _plan_fills(planner),
        "full": full,
    }


def _plan_fills(planner: Planner) -> dict[str, Unit]:
    """Plan complete targets from the records that are stored by default, by each rule."""
    variants: dict[str, Unit] = {}
    for method in ("min_ce", "avg_ce", "fixed_share"):
        fuse: dict[str, Any] = {"method": method, "tail": "unigram"}
        if method == "avg_ce":
            fuse["temperature"] = 0.1
        variants[f"{method}, unigram, lambda {LOW_LAMBDA:g}, 8 epochs"] = _train_low(
            planner, planner.sources, 8, fuse=fuse
        )
    fuse = {"method": "fixed_share", "tail": "unigram"}
    for weight in (0.1, {"start": 0.5, "end": 0.1, "shape": "linear"}):
        for decay in (0.1, 0.4):
            label = f"{weight:g}" if isinstance(weight, float) else "0.5 to 0.1"
            name = f"fixed_share, unigram, lambda {label}, decay {decay:g}, 8 epochs"
            variants[name] = planner.train(
                name, planner.sources, epochs=8, clm_weight=weight, weight_decay=decay, fuse=fuse
            )
    variants["fixed_share, unigram, lambda 0.3, 16 epochs"] = _train_low(
        planner, planner.sources, 16, fuse=fuse
    )
    variants["fixed_share, unigram, sources and copy, lambda 0.3, 8 epochs"] = _train_low(
        planner, planner.sources | {"copy": planner.target}, 8, fuse=fuse
    )
    return variants


def _train_low(planner: Planner, sources: dict[str, Unit], epochs: int, **more: Any) -> Unit:
    return planner.train("low lambda", sources, epochs=epochs, clm_weight=LOW_LAMBDA, **more)


def main() -> None:
    """Run the missing units of the chosen regimes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion.regimes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    parser.add_argument("--regimes", nargs="+", choices=sorted(REGIMES), default=["R1"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--questions", nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    plans = {
        (name, seed): plan_regime(REGIMES[name], seed)
        for name in chosen.regimes
        for seed in chosen.seeds
    }
    questions = chosen.questions or list(next(iter(plans.values())))
    units = [
        unit
        for question in questions
        for plan in plans.values()
        for unit in plan[question].values()
    ]
    run_units(units, chosen.out, chosen.data, work, workers=chosen.workers)


if __name__ == "__main__":
    main()
