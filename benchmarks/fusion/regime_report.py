"""The regimes' results: the chosen variants, what fusion gains over CLM, and the ablations."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fusion.intervals import (
    Documents,
    Interval,
    Nats,
    compare_groups,
    find_multiple,
    measure_interval,
    score_groups,
)
from benchmarks.fusion.regime_pages import draw_regimes, render_page
from benchmarks.fusion.text import HALVES
from benchmarks.fusion.units import Unit
from rayfuse.evaluate.scores import ALL

BRACKETS = ("full", "trials", "proposed")
"""Roles that explain a method or a default: they are trained for the first seed alone."""

SHARED = ("target", "best_source", "ensemble_mean", "ensemble_filter")
"""Roles of models that several regimes have: alone they do not make a regime."""

RIVALS = (
    *("target", "best_source", "distilled", "copy", "defaults", "fusellm"),
    *("sum_kl", "sum_kl_copy", "uld"),
)

PARAMETERS = 900_000
"""Of the target."""

STUDY = {
    "R0": ("more text, sources as strong as the target", 305_000),
    "R1": ("little text, strong sources", 102_000),
    "R2": ("little text, a weak target", 102_000),
    "R4": ("ample text, strong sources", 1_020_000),
}
"""The regimes that users may be in, and their tokens of text; rayfuse has no stage as R3."""

Plan = Mapping[str, Mapping[str, Unit]]
"""Variants by role and name, of one seed."""


def choose_variants(plan: Plan, out: Path) -> dict[str, str]:
    """Choose each role's variant with the lowest loss on the selection half of the first seed.

    A role is left out while one of its variants is not done.
    """
    chosen: dict[str, str] = {}
    if not _held_out(plan).is_done(out):
        return chosen
    for role, variants in plan.items():
        if role not in BRACKETS and all(unit.is_done(out) for unit in variants.values()):
            scores = score_selection(plan, role, out)
            chosen[role] = min(scores, key=lambda name: scores[name])
    return chosen


def score_selection(plan: Plan, role: str, out: Path) -> dict[str, float]:
    """Compute bits per byte of a role's finished variants on the selection half."""
    documents = _read_documents(plan, out)["selection"]
    return {
        name: score_groups(np.array(unit.read(out)["nats"]["selection"]), documents)[ALL]
        for name, unit in plan[role].items()
        if unit.is_done(out)
    }


def write_regimes(
    plans: Mapping[str, Mapping[int, Plan]], costs: Mapping[str, Sequence[Unit]], out: Path
) -> None:
    """Write regimes.json, RESULTS.md and the picture from the units that are done.

    Args:
        plans: The variants of each regime, by seed.
        costs: The units of `plan_costs`, of each regime.
        out: The study's folder.
    """
    found = {name: _describe_regime(by_seed, out) for name, by_seed in plans.items()}
    for name, units in costs.items():
        if found[name] and (described := describe_costs(units, out)):
            found[name]["costs"] = described
    known = {name: regime for name, regime in found.items() if regime}
    (out / "regimes.json").write_text(json.dumps(known, indent=1) + "\n")
    (out / "study.json").write_text(json.dumps(to_study(known), indent=1) + "\n")
    (out / "RESULTS.md").write_text(render_page(known), encoding="utf-8")
    (out / "regimes.png").write_bytes(draw_regimes(known))


def _describe_regime(plans: Mapping[int, Plan], out: Path) -> dict[str, Any]:
    first = next(iter(plans.values()))
    if not _held_out(first).is_done(out):
        return {}
    documents = _read_documents(first, out)["reported"]
    chosen = choose_variants(first, out)
    if set(chosen) <= {*SHARED}:
        return {}
    nats = {
        role: np.array(
            [
                plan[role][name].read(out)["nats"]["reported"]
                for plan in takewhile(_is_done(role, name, out), plans.values())
            ]
        )
        for role, name in chosen.items()
    }
    regime: dict[str, Any] = {
        "seeds": min((len(by_seed) for by_seed in nats.values()), default=0),
        "seeds_by_role": {role: len(by_seed) for role, by_seed in nats.items()},
        "chosen": chosen,
    }
    if "fused" in chosen:
        regime["epochs"] = first["fused"][chosen["fused"]].settings.get("epochs", 1)
    regime["selection"] = {role: score_selection(first, role, out) for role in first}
    regime |= {role: _score(by_seed, documents) for role, by_seed in nats.items()}
    if {"fused", "clm", "ensemble_filter", "ensemble_mean", "best_source"} <= set(nats):
        regime |= _describe_gain(nats, documents)
    return regime


def to_study(regimes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Convert the regimes that users may be in to the content of `rayfuse/plan/study.json`."""

    def take(found: Mapping[str, float]) -> list[float]:
        return [round(found[name], 4) for name in ("value", "low", "high")]

    return {
        name: {
            "situation": situation,
            "tokens_per_parameter": tokens / PARAMETERS,
            "seeds": min(regimes[name]["seeds_by_role"][role] for role in ("clm", "fused")),
            "epochs": regimes[name]["epochs"],
            "advantage": round(1 - regimes[name]["best_source"] / regimes[name]["target"], 4),
            "gain": take(regimes[name]["gain"]),
            "token_multiple_seeds": min(
                (
                    seeds
                    for role, seeds in regimes[name]["seeds_by_role"].items()
                    if role.startswith("clm ") or role in ("clm", "fused")
                ),
            ),
            "token_multiple": (
                take(regimes[name]["token_multiple"]) if "token_multiple" in regimes[name] else None
            ),
        }
        for name, (situation, tokens) in STUDY.items()
        if "gain" in regimes.get(name, {})
    }


def describe_costs(units: Sequence[Unit], out: Path) -> dict[str, dict[str, float]]:
    """Average what each role costs elsewhere over the seeds that are done.

    Returns:
        By role: `elsewhere`, bits per byte of text unlike the corpus, `copied`, the share of
        strings that are copied from the corpus, and the number of `seeds`.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        if unit.is_done(out):
            records.setdefault(unit.settings["role"], []).append(unit.read(out))
    return {
        role: {
            "elsewhere": float(
                np.mean([sum(r["nats"]["elsewhere"]) / r["bytes"] for r in found]) / np.log(2)
            ),
            "copied": float(np.mean([record["copied"] for record in found])),
            "seeds": len(found),
        }
        for role, found in records.items()
    }


def _is_done(role: str, name: str, out: Path) -> Callable[[Plan], bool]:
    return lambda plan: plan[role][name].is_done(out)


def _describe_gain(nats: dict[str, Nats], documents: Documents) -> dict[str, Any]:
    times = {role: int(role[4:-1]) for role in nats if role.startswith("clm ")}

    def measure_gain(losses: Mapping[str, float]) -> float:
        return 1 - losses["fused"] / losses["clm"]

    def measure_absorption(ensemble: str) -> Interval:
        return measure_interval(
            lambda losses: (losses["clm"] - losses["fused"]) / (losses["clm"] - losses[ensemble]),
            _take_common(nats, "clm", "fused", ensemble),
            documents,
        )

    gain = measure_interval(measure_gain, _take_common(nats, "fused", "clm"), documents)
    found: dict[str, Any] = {"gain": asdict(gain)}
    if times:
        common = _take_common(nats, "fused", "clm", *times)
        by_times = {1: common["clm"]} | {times[role]: common[role] for role in times}
        multiple, is_inside = find_multiple(common["fused"], by_times, documents)
        found["token_multiple"] = asdict(multiple) | {"is_inside_curve": is_inside}
    for name, ensemble in (
        ("absorption", "ensemble_filter"),
        ("absorption_of_mean", "ensemble_mean"),
    ):
        ahead = measure_interval(
            _subtract("clm", ensemble), _take_common(nats, "clm", ensemble), documents
        )
        if ahead.low > 0:  # else there is nothing to absorb, and the share means nothing
            found[name] = asdict(measure_absorption(ensemble))
    found["fused_minus"] = {
        role: {
            group: asdict(gap)
            for group, gap in compare_groups(
                *_take_common(nats, "fused", role).values(), documents
            ).items()
        }
        for role in nats
        if role in (*RIVALS, "clm", "clm_written")
    }
    return found


def _subtract(left: str, right: str) -> Callable[[Mapping[str, float]], float]:
    return lambda losses: losses[left] - losses[right]


def _take_common(nats: Mapping[str, Nats], *roles: str) -> dict[str, Nats]:
    """Take the seeds that several roles have: the first ones, in the order of seeds."""
    seeds = min(len(nats[role]) for role in roles)
    return {role: nats[role][:seeds] for role in roles}


def _score(nats: Nats, documents: Documents) -> float:
    return float(np.mean([score_groups(of_seed, documents)[ALL] for of_seed in nats]))


def _held_out(plan: Plan) -> Unit:
    return plan["target"]["target"].needs["held_out"]


def _read_documents(plan: Plan, out: Path) -> dict[str, Documents]:
    record = _held_out(plan).read(out)
    documents: dict[str, Documents] = {
        half: [(str(name), str(domain), int(size)) for name, domain, size in record[half]]
        for half in HALVES
    }
    return documents
