"""The units of the study: for every seed, the variants of each question, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.fusion.planner import TOP_KS, Planner
from benchmarks.fusion.scales import EXPERTS, SOURCES, TARGET, Make, Scale
from benchmarks.fusion.units import Unit

LAMBDAS = (0.9, 0.7, 0.5, 0.3, 0.0)
RAMPS = ((0.5, 0.9), (0.5, 1.0), (0.3, 1.0))
"""Values of lambda at the first and at the last step."""

CLM, FUSED, TARGET_ALONE = "CLM", "fused", "target"

WHOLE_CHARACTERS = "bytes, whole characters alone"
"""As `bytes`, but the probability of any part of a character goes to the tail, except for the true
next token. The name is part of the keys of stored units."""

UNFINISHED = "bytes, certain or not"
"""As `bytes`, but a token that ends inside a character maps to the token of its first bytes, as
before ALIGN_VERSION 4. The name is part of the keys of stored units."""

INSIDE_TOKENS = "bytes, and inside tokens"
"""As `bytes`, with `align.inside_tokens`."""

TUNING = "tuning"
"""Key beside the questions: learning rates, compared on the selection half."""

StudyPlan = dict[str, dict[str, Unit]]
"""The variants of each question, by question and name; some units occur in several."""


def plan_seed(scale: Scale, seed: int) -> StudyPlan:
    """Plan the units of one seed."""
    planner = Planner(scale, seed)
    train, sources = planner.train, planner.sources
    clm, fused = train(CLM, {}), train(FUSED, sources)
    experts = {
        "+".join(domains): planner.model(
            Make("target", TARGET.family, TARGET.tokenizer, domains),
            scale.target,
            tokens=scale.expert_tokens,
            start=planner.target,
        )
        for domains in EXPERTS
    }
    held_out = {"held_out": planner.held_out}
    plan = {
        "1": {
            TARGET_ALONE: planner.score(planner.target),
            CLM: clm,
            **{name: planner.score(source) for name, source in sources.items()},
            FUSED: fused,
            "ensemble": Unit("ensemble", f"sources, seed {seed}", {}, sources | held_out),
        },
        "2": {CLM: clm, FUSED: fused}
        | {f"CLM {times}x": train(f"CLM {times}x", {}, times=times) for times in scale.multiples},
        "8": _plan_strong_and_bad(planner, clm, fused),
        "7": _plan_losses(planner, clm),
        "6": _plan_records(planner, clm),
        "5": _plan_choices(planner, clm),
        "4": _plan_alignments(planner, clm),
        "3": _plan_numbers(planner, clm, fused),
        "1b": {
            TARGET_ALONE: planner.score(planner.target),
            **{f"expert {name}": planner.score(model) for name, model in experts.items()},
            "ensemble of experts": Unit(
                "ensemble", f"experts, seed {seed}", {}, experts | held_out
            ),
            "merged experts": Unit("merge", f"experts, seed {seed}", {}, experts | held_out),
            CLM: clm,
            "fused experts": train("fused experts", experts),
        },
        TUNING: {},
    }
    if seed == scale.seeds[0]:
        plan[TUNING] = _plan_tuning(planner)
    return plan


def _plan_tuning(planner: Planner) -> dict[str, Unit]:
    variants: dict[str, Unit] = {}
    for name, sources in ((CLM, {}), (FUSED, planner.sources)):
        for rate in planner.scale.rates:
            label = f"{name}, {rate:g}"
            variants[label] = planner.train(label, sources, rate=rate)
    weights = {f"lambda {weight:g}": weight for weight in (0.9, 0.8, 0.7, 0.6, 0.5, 0.3)}
    for name, weight in (weights | _name_ramps()).items():
        variants[f"fused, {name}"] = planner.train(name, planner.sources, clm_weight=weight)
    return variants


def order_units(
    plans: Mapping[int, StudyPlan], questions: Sequence[str] | None = None
) -> list[Unit]:
    """List the units of some questions, or of all, by question and then by seed."""
    names = next(iter(plans.values())) if questions is None else questions
    return [unit for name in names for plan in plans.values() for unit in plan[name].values()]


def _plan_strong_and_bad(planner: Planner, clm: Unit, fused: Unit) -> dict[str, Unit]:
    scale, train, sources = planner.scale, planner.train, planner.sources
    untrained = planner.model(SOURCES[planner.seed % 3], scale.source, tokens=0)
    weak = planner.model(TARGET, scale.target, tokens=scale.weak_target_tokens)
    with_noise = {**sources, "untrained": untrained}
    return {
        CLM: clm,
        FUSED: fused,
        "and an untrained source": train("noise", with_noise),
        "and an untrained source, avg_ce": train(
            "noise, avg_ce", with_noise, fuse={"method": "avg_ce"}
        ),
        "an untrained source alone": train("noise alone", {"untrained": untrained}),
        "and an untrained source, skip_noise": train(
            "noise, skip_noise", with_noise, fuse={"skip_noise": True}
        ),
        "an untrained source alone, skip_noise": train(
            "noise alone, skip_noise", {"untrained": untrained}, fuse={"skip_noise": True}
        ),
        "untrained": planner.score(untrained),
        "weak target": planner.score(weak),
        "weak target: CLM": train("weak, CLM", {}, start=weak),
        "weak target: fused": train("weak, fused", sources, start=weak),
    }


def _plan_numbers(planner: Planner, clm: Unit, fused: Unit) -> dict[str, Unit]:
    """Plan 0 to 3 sources; the order of the sources rotates with the seed."""
    names = list(planner.sources)
    first = planner.seed % len(names)
    turned = {name: planner.sources[name] for name in names[first:] + names[:first]}
    one, two = (dict(list(turned.items())[:number]) for number in (1, 2))
    itself = {"itself": planner.target}
    return {
        "0 sources (CLM)": clm,
        "1 source": planner.train("1 source", one),
        "2 sources": planner.train("2 sources", two),
        "3 sources": fused,
        "the target's own copy": planner.train("its copy", itself),
        "3 sources and the copy": planner.train("3 and its copy", planner.sources | itself),
    }


def _plan_alignments(planner: Planner, clm: Unit) -> dict[str, Unit]:
    sources = planner.sources
    variants = {CLM: clm}
    for method in (
        "bytes",
        WHOLE_CHARACTERS,
        UNFINISHED,
        "exact",
        "min_edit_distance",
        "cooccurrence",
    ):
        variants[method] = planner.train(method, sources, align={"method": method})
    for fault in (False, True):
        name = "paper preset" + ", with its off-by-one" * fault
        variants[name] = planner.train(
            name,
            sources,
            align={"record": "top-10", "method": "min_edit_distance", "fault": fault},
            fuse={"cost": "nats_per_token", "tail": "renormalise"},
            clm_weight=0.9,
        )
    return variants


def _plan_choices(planner: Planner, clm: Unit) -> dict[str, Unit]:
    settings: dict[str, dict[str, Any]] = {
        "min_ce, row": {"method": "min_ce", "unit": "row", "cost": "nats_per_byte"},
        "min_ce, row, per token": {"method": "min_ce", "unit": "row", "cost": "nats_per_token"},
        "min_ce, document": {"method": "min_ce", "unit": "document"},
        "min_ce, span of 32": {"method": "min_ce", "unit": "span", "span_tokens": 32},
        "min_ce, token": {"method": "min_ce", "unit": "token"},
        "avg_ce, row": {"method": "avg_ce", "unit": "row"},
        "avg_ce, row, temperature 0.1": {"method": "avg_ce", "unit": "row", "temperature": 0.1},
        "avg_ce, span of 32": {"method": "avg_ce", "unit": "span", "span_tokens": 32},
    }
    return {CLM: clm} | {
        name: planner.train(name, planner.sources, fuse=fuse) for name, fuse in settings.items()
    }


def _plan_records(planner: Planner, clm: Unit) -> dict[str, Unit]:
    sources, draws = planner.sources, planner.scale.draws
    variants = {CLM: clm}
    for top_k in TOP_KS:
        name = f"top-{top_k}, bucket"
        align, fuse = {"record": f"top-{top_k}"}, {"tail": "bucket"}
        variants[name] = planner.train(name, sources, align=align, fuse=fuse)
    for tail in ("truth", "renormalise"):
        name = f"top-16, {tail}"
        align, fuse = {"record": "top-16"}, {"tail": tail}
        variants[name] = planner.train(name, sources, align=align, fuse=fuse)
    for record in (f"sampled-0+{draws}", f"sampled-{draws // 2}+{draws // 2}"):
        variants[record] = planner.train(record, sources, align={"record": record})
    variants["full distributions"] = planner.train("full", sources, full=True)
    return variants


def _name_ramps() -> dict[str, Any]:
    return {
        f"lambda {start:g} to {end:g}": {"start": start, "end": end, "shape": "linear"}
        for start, end in RAMPS
    }


def _plan_losses(planner: Planner, clm: Unit) -> dict[str, Unit]:
    variants = {"lambda 1 (CLM)": clm}
    for weight in LAMBDAS:
        name = f"lambda {weight:g}"
        variants[name] = planner.train(name, planner.sources, clm_weight=weight)
    variants |= {
        name: planner.train(name, planner.sources, clm_weight=ramp)
        for name, ramp in _name_ramps().items()
    }
    for divergence in ("reverse_kl", "jensen_shannon"):
        variants[divergence] = planner.train(divergence, planner.sources, divergence=divergence)
    return variants
