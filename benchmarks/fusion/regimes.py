"""When does fusion pay? The same models in several situations of text and strength.

    python -m benchmarks.fusion.regimes --out DIR [--regimes R0 R1 ...] [--only-choose]

R0 is the study's own situation, R1 a small corpus and strong sources, R2 a weak target on the same
corpus, R4 strong sources and ample text. Each role (CLM, the target's own copy, other libraries'
losses, fusion) has several variants. All are trained for the first seed, the one with the lowest
loss on the selection half is chosen, and only that one is trained for the other seeds and
reported. The reported half is text that is reserved for it: no model is trained on it. The split of
the text and the sources are the same for all seeds; a seed decides the target, the corpus and the
order.

DIR/regimes.json, RESULTS.md and results.jsonl.gz are written at the end, from the seeds that are
done; the folder `regime_results` holds the latest. Results are stored as by `benchmarks.fusion`, so
that a killed run resumes.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.fusion.plan import CLM, Planner
from benchmarks.fusion.regime_report import choose_variants, write_regimes
from benchmarks.fusion.scales import SCALES, Scale, Size
from benchmarks.fusion.units import Unit, restore_results, run_units, save_results
from benchmarks.fusion.work import work

SEEDS = (2, 3, 4)
"""Seed 1 was used up by trials."""

SPLIT_SEED = 2

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
    "tiny": replace(SCALES["tiny"], seeds=SEEDS),  # for tests
}

RATE = 4e-3
"""The peak learning rate that was best for CLM on the first study's corpus; the highest here."""

HEAVY_DECAYS = (0.4, 1.6)
"""Weight decay beside 0.1: it delays overfitting (arXiv 2509.14786)."""

BASE: dict[str, Any] = {
    "clm_weight": 0.3,
    "rate": RATE,
    "fuse": {"method": "fixed_share"},
    "align": {"record": "sampled-8+8"},
}
"""The variants of fusion change one of these at a time."""

TOP_16: dict[str, Any] = {"align": {"record": "top-16"}}
FILLED: dict[str, Any] = {"fuse": {"method": "fixed_share", "tail": "unigram"}}
WITH_COPY: dict[str, dict[str, Any]] = {
    "": {},
    ", rate 0.008": {"rate": 2 * RATE},
    ", rate 0.008, decay 0.4": {"rate": 2 * RATE, "weight_decay": 0.4},
    ", rate 0.008, sampled 16+16": {"rate": 2 * RATE, "align": {"record": "sampled-16+16"}},
}
"""What helped the sources alone, tried with the target's own copy among them."""

FALLING = {"start": 0.5, "end": 0.1, "shape": "linear"}

SWITCH_RATE = 0.05
"""Of the filter ensemble."""

RESULTS = Path(__file__).parent / "regime_results" / "results.jsonl.gz"
"""The scores that are known: copied here from DIR, they are not computed again."""

Role = Mapping[str, Unit]
"""The variants of a role by name."""


def plan_regime(name: str, seed: int) -> dict[str, Role]:
    """Plan the variants of each role of a regime for one seed."""
    planner = Planner(REGIMES[name], seed, split_seed=SPLIT_SEED)
    sources, held_out = planner.sources, {"held_out": planner.held_out}
    is_small = name in ("R1", "R2")
    roles: dict[str, Role] = {
        "target": {"target": planner.score(planner.target)},
        "best_source": {source: planner.score(model) for source, model in sources.items()},
        "ensemble_mean": {"mean": Unit("ensemble", "mean of sources", {}, sources | held_out)},
        "ensemble_filter": {
            "filter": Unit(
                "ensemble", "filter of sources", {"switch_rate": SWITCH_RATE}, sources | held_out
            )
        },
        "clm": _plan_clm(planner, is_small),
    }
    roles |= {
        "fused": _plan_fused(planner, is_small),
        "copy": _plan_base(
            planner, "copy", {"copy": planner.target}, (8, 16) if is_small else (1, 2)
        ),
        "distilled": _plan_distilled(planner, 8 if is_small else 2),
        "defaults": _plan_defaults(planner),
        "fusellm": _plan_fusellm(planner),
        "sum_kl": _plan_sum(planner, (8,) if is_small else (1, 2)),
        "uld": _plan_rivals(planner, 4 if is_small else 1),
    }
    if is_small:
        roles["full"] = {
            f"full, lambda {weight:g}, 4 epochs": planner.train(
                "full", sources, full=True, clm_weight=weight, epochs=4
            )
            for weight in (0.0, 0.1, 0.3)
        }
    roles |= {
        f"clm {times}x": {
            f"CLM, {times}x the text, {epochs} epochs, rate {rate:g}": planner.train(
                f"{times}x", {}, times=times, epochs=epochs, rate=rate
            )
            for epochs in ((4,) if is_small else (1, 2))
            for rate in (RATE / 2, RATE / 4)
        }
        for times in planner.scale.multiples
    }
    return roles


def _plan_clm(planner: Planner, is_small: bool) -> dict[str, Unit]:
    """Plan CLM: epochs by learning rates, heavy weight decay at a low rate, and no training."""
    rates = (RATE, RATE / 2, RATE / 4, RATE / 8)
    epochs_tried = (2, 4, 8) if is_small else (1, 2)
    grid = [(epochs, rate, 0.1) for rate in rates for epochs in epochs_tried]
    many = 8 if is_small else 2
    grid += [(many, RATE / 4, decay) for decay in HEAVY_DECAYS]
    return {"no training": planner.score(planner.target)} | {
        f"CLM, {epochs} epochs, rate {rate:g}, decay {decay:g}": planner.train(
            CLM, {}, epochs=epochs, rate=rate, weight_decay=decay
        )
        for epochs, rate, decay in grid
    }


def _plan_base(
    planner: Planner, name: str, sources: dict[str, Unit], epochs: tuple[int, ...]
) -> dict[str, Unit]:
    """Plan the base for other sources, at more than one number of epochs and at a higher rate."""
    variants = {
        f"{name}, {number} epochs": planner.train(name, sources, epochs=number, **BASE)
        for number in epochs
    }
    high = BASE | {"rate": 2 * RATE}
    variants[f"{name}, {epochs[0]} epochs, rate {2 * RATE:g}"] = planner.train(
        name, sources, epochs=epochs[0], **high
    )
    return variants


def _plan_fused(planner: Planner, is_small: bool) -> dict[str, Unit]:
    """Plan fusion: the base, its settings changed one at a time, and other complete targets."""
    epochs = 8 if is_small else 2
    base: dict[str, Any] = {"epochs": epochs, **BASE}
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        f"{epochs * 2} epochs": {"epochs": epochs * 2},
        "lambda 0.1": {"clm_weight": 0.1},
        "lambda 0.5 to 0.1": {"clm_weight": FALLING},
        "decay 0.4": {"weight_decay": 0.4},
        "min_ce": {"fuse": {"method": "min_ce"}},
        "avg_ce, temperature 0.1": {"fuse": {"method": "avg_ce", "temperature": 0.1}},
        **{f"rate {rate:g}": {"rate": rate} for rate in (2 * RATE, RATE / 2)},
        "top-16, bucket": TOP_16,
        **{
            f"top-16, unigram, rate {rate:g}": TOP_16 | FILLED | {"rate": rate}
            for rate in (RATE, RATE / 2, RATE / 4)
        },
        "top-64, unigram": {"align": {"record": "top-64"}} | FILLED,
    }
    variants = {
        label: planner.train(label, planner.sources, **base | changed)
        for label, changed in changes.items()
    }
    with_copy = planner.sources | {"copy": planner.target}
    for label, changed in WITH_COPY.items():
        variants[f"and the copy{label}"] = planner.train("and copy", with_copy, **base | changed)
    return variants


def _plan_distilled(planner: Planner, epochs: int) -> dict[str, Unit]:
    """Plan distillation from one source alone."""
    variants: dict[str, Unit] = {}
    for name, source in planner.sources.items():
        variants |= _plan_base(planner, name, {name: source}, (epochs,))
    return variants


def _plan_defaults(planner: Planner) -> dict[str, Unit]:
    return {
        f"defaults, {epochs} epochs": planner.train(
            "defaults",
            planner.sources,
            align=TOP_16["align"],
            fuse={"method": "min_ce", "unit": "row", "tail": "bucket"},
            clm_weight={"start": 0.5, "end": 0.9, "shape": "linear"},
            epochs=epochs,
        )
        for epochs in (1, 4)
    }


def _plan_fusellm(planner: Planner) -> dict[str, Unit]:
    """Plan the published rule: its alignment, record, choice of a source, loss and lambda."""
    return {
        f"FuseLLM, {epochs} epochs, rate {rate:g}": planner.train(
            "FuseLLM",
            planner.sources,
            align={"record": "top-10", "method": "min_edit_distance"},
            fuse={
                "method": "min_ce",
                "unit": "row",
                "cost": "nats_per_token",
                "tail": "renormalise",
            },
            clm_weight=0.9,
            rate=rate,
            epochs=epochs,
        )
        for epochs in (1, 4)
        for rate in (RATE, RATE / 4)
    }


def _plan_sum(planner: Planner, epochs: tuple[int, ...]) -> dict[str, Unit]:
    """Plan the plain sum of all sources' divergences.

    The gradient of the sum of S forward divergences is S times that of the one from the sources'
    mean, so lambda 0.3 of CLM beside 0.7 of the sum is lambda 0.3 / (0.3 + 0.7 S) beside the mean
    where all sources have a signal. The mean beside lambda 0.3 is tried as well.
    """
    weight = 0.3 / (0.3 + 0.7 * len(planner.sources))
    mean = BASE | {"fuse": {"method": "avg_ce", "temperature": 1e6}}
    return {
        f"sum of KL, lambda {clm_weight:.3g}, rate {rate:g}, {number} epochs": planner.train(
            "sum of KL",
            planner.sources,
            epochs=number,
            **mean | {"clm_weight": clm_weight, "rate": rate},
        )
        for clm_weight, rate in ((weight, RATE), (0.3, RATE), (0.3, 2 * RATE))
        for number in epochs
    }


def _plan_rivals(planner: Planner, epochs: int) -> dict[str, Unit]:
    return {
        f"{loss}, {epochs} epochs": planner.train(
            loss,
            planner.sources,
            loss=loss,
            epochs=epochs,
            align=TOP_16["align"],
            fuse={"method": "min_ce", "unit": "row"},
        )
        for loss in ("uld", "gold")
    }


def main() -> None:
    """Run the missing units of the chosen regimes, and write what is known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion.regimes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES)[:-1])
    parser.add_argument("--roles", nargs="+", help="run these roles only")
    parser.add_argument("--only-choose", action="store_true", help="run the first seed only")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    plans_of = {name: {seed: plan_regime(name, seed) for seed in SEEDS} for name in REGIMES}
    every = [
        unit
        for plans in plans_of.values()
        for plan in plans.values()
        for variants in plan.values()
        for unit in variants.values()
    ]
    if RESULTS.is_file():
        restore_results(every, given.out, RESULTS)
    for name in () if given.report_only else given.regimes:
        plans = plans_of[name]
        first = plans[SEEDS[0]]
        unknown = set(given.roles or ()) - set(first)
        if unknown:
            parser.error(f"--roles {' '.join(sorted(unknown))}: {name} has no such role")
        roles = given.roles or list(first)
        units = [first["target"]["target"].needs["held_out"]]  # its list of documents is read
        units += [unit for role in roles for unit in first[role].values()]
        run_units(units, given.out, given.data, work, workers=given.workers)
        if given.only_choose:
            continue
        chosen = choose_variants(first, given.out)
        finals = [
            plan[role][chosen[role]] for role in roles for plan in plans.values() if role in chosen
        ]
        run_units(finals, given.out, given.data, work, workers=given.workers)
    shown = [name for name in REGIMES if name != "tiny" or name in given.regimes]
    write_regimes({name: plans_of[name] for name in shown}, given.out)
    save_results(every, given.out, given.out / RESULTS.name)


if __name__ == "__main__":
    main()
