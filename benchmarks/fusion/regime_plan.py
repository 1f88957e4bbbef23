"""The units of the regimes: for every role, its variants by name."""

from collections.abc import Mapping
from typing import Any

from benchmarks.fusion.plan import CLM, INSIDE_TOKENS
from benchmarks.fusion.planner import Planner
from benchmarks.fusion.regime_grids import (
    BASE,
    FALLING,
    FAST,
    GRIDS,
    RATE,
    REGIMES,
    SPLIT_SEED,
    TOP_16,
    WITH_COPY,
    WRITTEN_TOKENS,
    Grid,
)
from benchmarks.fusion.units import Unit

HEAVY_DECAYS = (0.4, 1.6)
"""Weight decay beside 0.1: it delays overfitting (arXiv 2509.14786)."""

SWITCH_RATE = 0.05
"""Of the filter ensemble."""

SHARED_ROLES = ("target", "best_source", "ensemble_mean", "ensemble_filter", "clm")
"""Roles that R3 has in common with R1."""

COSTLY = ("target", "clm", "copy", "fused")
"""Roles of which it is measured what they cost on other text."""

Role = Mapping[str, Unit]
"""The variants of a role by name."""


def plan_regime(name: str, seed: int) -> dict[str, Role]:
    """Plan the variants of each role of a regime for one seed."""
    planner, grid = Planner(REGIMES[name], seed, split_seed=SPLIT_SEED), GRIDS[name]
    sources, held_out = planner.sources, {"held_out": planner.held_out}
    is_wide = name in ("R1", "R3")
    filtered = Unit(
        "ensemble", "filter of sources", {"switch_rate": SWITCH_RATE}, sources | held_out
    )
    roles: dict[str, Role] = {
        "target": {"target": planner.score(planner.target)},
        "best_source": {source: planner.score(model) for source, model in sources.items()},
        "ensemble_mean": {"mean": Unit("ensemble", "mean of sources", {}, sources | held_out)},
        "ensemble_filter": {"filter": filtered},
        "clm": _plan_clm(planner, grid),
        "fused": _plan_wide(planner, grid) if is_wide else _plan_few(planner, grid),
        "copy": _plan_copy(planner, grid, is_wide=is_wide),
        "distilled": _plan_distilled(planner, grid, is_wide=is_wide),
        "defaults": _plan_defaults(planner, grid),
        "proposed": _plan_proposed(planner, grid),
        "fusellm": _plan_fusellm(planner, grid, is_wide=is_wide),
        **_plan_sums(planner, grid, is_wide=is_wide),
        "uld": _plan_rivals(planner, grid),
    }
    if name == "R1":
        roles["full"] = {
            f"full, lambda {weight:g}, 4 epochs": planner.train(
                "full", sources, full=True, clm_weight=weight, epochs=4
            )
            for weight in (0.0, 0.1, 0.3)
        }
        roles["trials"] = _plan_trials(planner, grid)
    if name == "R3":  # other losses have not been given written text: they are no comparison
        unwritten = roles["fused"]
        roles = {role: variants for role, variants in roles.items() if role in SHARED_ROLES}
        roles["fused"], roles["clm_written"] = _plan_written(planner)
        roles["fused_unwritten"] = unwritten
        roles["clm"] = {**roles["clm"], **roles["clm_written"]}
    return roles | {
        f"clm {times}x": {
            f"CLM, {times}x the text, {epochs} epochs, rate {rate:g}": planner.train(
                f"{times}x", {}, times=times, epochs=epochs, rate=rate
            )
            for epochs in (_few_epochs(grid),)
            for rate in grid.multiple_rates
        }
        for times in planner.scale.multiples
    }


def plan_costs(name: str, seed: int, chosen: Mapping[str, str]) -> Role:
    """Plan what the chosen variants cost elsewhere (`costs.py`), by role.

    Args:
        name: The regime.
        seed: One of its seeds.
        chosen: The variant of each role that is chosen.
    """
    planner, plan = Planner(REGIMES[name], seed, split_seed=SPLIT_SEED), plan_regime(name, seed)
    found: dict[str, Unit] = {}
    for role in [role for role in COSTLY if role in chosen]:
        unit = plan[role][chosen[role]]
        model = unit.needs["model"] if unit.kind == "score" else unit
        needs = {
            "model": model,
            "tokenizer": planner.tokenizers["target"],
            "corpus": planner.corpora[1],
            "held_out": planner.held_out,
        }
        settings = {"max_tokens": planner.scale.max_tokens, "role": role}
        found[role] = Unit("costs", f"{role}, seed {seed}", settings, needs)
    return found


def _more_epochs(grid: Grid) -> list[int]:
    """List CLM's most epochs, if they are more than those of other variants: all get as many."""
    return [epochs for epochs in (max(grid.clm_epochs),) if epochs > grid.epochs]


def _few_epochs(grid: Grid) -> int:
    """Return the epochs of variants that learn from labels, or from heads alone."""
    return min(4, grid.epochs)


def _plan_clm(planner: Planner, grid: Grid) -> Role:
    """Plan CLM: epochs by learning rates, heavy weight decay at a low rate, and no training."""
    tried = [(epochs, rate, 0.1) for rate in grid.clm_rates for epochs in grid.clm_epochs]
    most = max(grid.clm_epochs)
    if most > 1:
        tried += [(most, RATE / 4, decay) for decay in HEAVY_DECAYS]
    return {"no training": planner.score(planner.target)} | {
        f"CLM, {epochs} epochs, rate {rate:g}, decay {decay:g}": planner.train(
            CLM, {}, epochs=epochs, rate=rate, weight_decay=decay
        )
        for epochs, rate, decay in tried
    }


def _plan_wide(planner: Planner, grid: Grid) -> Role:
    """Plan fusion: the base, its settings changed one at a time, and other complete targets."""
    epochs = grid.epochs
    base: dict[str, Any] = {"epochs": epochs, **BASE}
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        f"{epochs * 2} epochs": {"epochs": epochs * 2},
        "lambda 0.1": {"clm_weight": 0.1},
        "lambda 0.5 to 0.1": {"clm_weight": FALLING},
        "decay 0.4": {"weight_decay": 0.4},
        f"rate 0.008, decay 0.4, {epochs * 2} epochs": FAST | {"epochs": epochs * 2},
        "min_ce": {"fuse": {"method": "min_ce"}},
        "avg_ce, temperature 0.1": {"fuse": {"method": "avg_ce", "temperature": 0.1}},
        **{f"rate {rate:g}": {"rate": rate} for rate in (2 * RATE, RATE / 2)},
        "top-16, bucket": TOP_16,
    }
    variants = {
        label: planner.train(label, planner.sources, **base | changed)
        for label, changed in changes.items()
    }
    for label, changed in WITH_COPY.items():
        variants[f"and the copy{label}"] = planner.train(
            "and copy", _add_copy(planner), **base | changed
        )
    return variants


def _plan_few(planner: Planner, grid: Grid) -> Role:
    """Plan the variants of fusion that are tried outside R1."""
    base: dict[str, Any] = {"epochs": grid.epochs, **BASE}
    changes: dict[str, dict[str, Any]] = {
        "rate 0.008, decay 0.4": FAST,
        "rate 0.004": {},
        "rate 0.002": {"rate": RATE / 2},
        "rate 0.002, lambda 0.6": {"rate": RATE / 2, "clm_weight": 0.6},
    }
    variants = {
        f"and the copy, {label}": planner.train("and copy", _add_copy(planner), **base | changed)
        for label, changed in changes.items()
    }
    for epochs in _more_epochs(grid):
        for weight in (0.3, 0.6, 0.8):
            variants[f"and the copy, rate 0.004, lambda {weight:g}, {epochs} epochs"] = (
                planner.train(
                    "and copy",
                    _add_copy(planner),
                    **base | {"epochs": epochs, "clm_weight": weight},
                )
            )
    return variants | {"rate 0.004": planner.train("base", planner.sources, **base)}


def _add_copy(planner: Planner) -> dict[str, Unit]:
    return planner.sources | {"copy": planner.target}


def _plan_written(planner: Planner) -> tuple[Role, Role]:
    """Plan training on the corpus and written text, half of each step: fusion, and CLM."""
    written = planner.write(WRITTEN_TOKENS, **BASE["align"])
    fused = {
        "and the copy, " * has_copy
        + f"half written, {epochs} epochs, rate {rate:g}, decay 0.4": planner.train(
            "written",
            _add_copy(planner) if has_copy else planner.sources,
            written=written,
            epochs=epochs,
            **BASE | FAST | {"rate": rate},
        )
        for epochs, rate, has_copy in (
            (8, 2 * RATE, False),
            (8, RATE, False),
            (16, 2 * RATE, False),
            (16, 2 * RATE, True),
        )
    }
    clm = {
        f"CLM, half written, {epochs} epochs, rate {rate:g}, decay {decay:g}": planner.train(
            "CLM, written", {}, written=written, epochs=epochs, rate=rate, weight_decay=decay
        )
        for epochs, rate, decay in (
            *((8, rate, 0.1) for rate in (RATE, RATE / 2, RATE / 4)),
            (16, RATE / 2, 0.1),
            (8, 2 * RATE, 0.4),
        )
    }
    return fused, clm


def _plan_trials(planner: Planner, grid: Grid) -> Role:
    """Plan changes of the fast variant with the copy; most are no settings of rayfuse."""
    fast: dict[str, Any] = {"epochs": grid.epochs, **BASE, **FAST}
    fixed = {"copy_share": 0.2, "copy": planner.target}
    student = planner.train("student", planner.sources, keep=True, **fast | {"trial": fixed})
    changes: dict[str, dict[str, Any]] = {
        "lambda 0.5": {"clm_weight": 0.5},
        "rate 0.012": {"rate": 3 * RATE},
        "decay 1": {"weight_decay": 1.0},
        "signals inside source tokens": {
            "align": {"record": "sampled-8+8", "method": INSIDE_TOKENS}
        },
        "rows cut anew": {"trial": {"views": True}},
        "moving average of the weights": {"trial": {"average": 0.98}},
        "a tenth of the input is noise": {"trial": {"noise": 0.1}},
        "dropout of a tenth": {"trial": {"dropout": 0.1}},
        "4 rows a step, rate 0.0056": {"rows_per_step": 4, "rate": 1.4 * RATE},
    }
    variants = {
        label: planner.train(label, _add_copy(planner), **fast | changed)
        for label, changed in changes.items()
    }
    for label, copy in (("the copy", planner.target), ("second round: the student", student)):
        trial = {"trial": {"copy_share": 0.3, "copy": copy}}
        variants[f"{label} has a fixed share of 0.3"] = planner.train(
            label, planner.sources, **fast | trial
        )
    for rate in (RATE / 8, RATE / 2):
        adapted = {
            name: planner.adapt(source, epochs=3, rate=rate)
            for name, source in planner.sources.items()
        }
        variants[f"sources adapted to the other half, rate {rate:g}"] = planner.train(
            "adapted", adapted | {"copy": planner.target}, **fast
        )
    return variants | {"the copy has a fixed share of 0.2": student}


def _plan_copy(planner: Planner, grid: Grid, *, is_wide: bool) -> Role:
    """Plan the base with the target's own copy alone."""
    high = 2 * RATE if grid.epochs > 2 else RATE / 2
    tried = [(grid.epochs, RATE, 0.1), (grid.epochs, high, 0.1)]
    tried += [(epochs, RATE, 0.1) for epochs in _more_epochs(grid)]
    if is_wide:
        tried += [(2 * grid.epochs, RATE, 0.1), (2 * grid.epochs, high, 0.4)]
    return {
        f"copy, {epochs} epochs, rate {rate:g}, decay {decay:g}": planner.train(
            "copy",
            {"copy": planner.target},
            epochs=epochs,
            **BASE | {"rate": rate, "weight_decay": decay},
        )
        for epochs, rate, decay in tried
    }


def _plan_distilled(planner: Planner, grid: Grid, *, is_wide: bool) -> Role:
    """Plan the base with one source alone."""
    tried = [(name, grid.epochs, RATE, 0.1) for name in planner.sources]
    if is_wide:
        tried += [(name, grid.epochs, 2 * RATE, 0.1) for name in planner.sources]
        tried.append(("llama", 2 * grid.epochs, 2 * RATE, 0.4))  # the best one of those above
    return {
        f"{name}, {epochs} epochs, rate {rate:g}, decay {decay:g}": planner.train(
            name,
            {name: planner.sources[name]},
            epochs=epochs,
            **BASE | {"rate": rate, "weight_decay": decay},
        )
        for name, epochs, rate, decay in tried
    }


def _plan_defaults(planner: Planner, grid: Grid) -> Role:
    return {
        f"defaults, {epochs} epochs, rate {rate:g}": planner.train(
            "defaults",
            planner.sources,
            align=TOP_16["align"],
            fuse={"method": "min_ce", "unit": "row", "tail": "bucket"},
            clm_weight={"start": 0.5, "end": 0.9, "shape": "linear"},
            epochs=epochs,
            rate=rate,
        )
        for epochs, rate in dict.fromkeys(
            [(1, RATE), (_few_epochs(grid), RATE), (_few_epochs(grid), RATE / 4)]
            + [(epochs, RATE) for epochs in _more_epochs(grid)]
        )
    }


def _plan_proposed(planner: Planner, grid: Grid) -> Role:
    """Plan what other defaults would give: without a copy, at the best rate of most regimes."""
    epochs = min(4, max(grid.epochs, *grid.clm_epochs))
    tried = [(BASE, 0.3), (BASE, 0.5), (BASE, 0.7), (BASE | TOP_16, 0.5)]
    return {
        f"fixed_share, {base['align']['record']}, lambda {weight:g}, {epochs} epochs": (
            planner.train(
                "proposed", planner.sources, epochs=epochs, **base | {"clm_weight": weight}
            )
        )
        for base, weight in tried
    }


def _plan_fusellm(planner: Planner, grid: Grid, *, is_wide: bool) -> Role:
    """Plan the published rule: its alignment, record, choice of a source, loss and lambda."""
    few = _few_epochs(grid)
    tried = [(few, rate, 0.1) for rate in ((RATE, RATE / 4) if is_wide else (RATE / 2, RATE / 4))]
    tried += [(epochs, RATE / 2, 0.1) for epochs in _more_epochs(grid)]
    if is_wide:
        tried += [(1, RATE, 0.1), (1, RATE / 4, 0.1), (grid.epochs, RATE / 4, 0.4)]
    return {
        f"FuseLLM, {epochs} epochs, rate {rate:g}, decay {decay:g}": planner.train(
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
            weight_decay=decay,
            epochs=epochs,
        )
        for epochs, rate, decay in tried
    }


def _plan_sums(planner: Planner, grid: Grid, *, is_wide: bool) -> dict[str, Role]:
    """Plan the plain sum of all sources' divergences, and with the target's copy among them.

    The gradient of the sum of S forward divergences is S times that of the one from the sources'
    mean, so lambda 0.3 of CLM beside 0.7 of the sum is lambda 0.3 / (0.3 + 0.7 S) beside the mean
    where all sources have a signal. The mean beside lambda 0.3 is tried as well.
    """
    weight = 0.3 / (0.3 + 0.7 * len(planner.sources))
    mean = BASE | {"fuse": {"method": "avg_ce", "temperature": 1e6}}
    tried = [(0.3, RATE, 0.1, 1), (0.3, 2 * RATE, 0.1, 1)]
    if is_wide:
        tried += [(weight, RATE, 0.1, 1), (0.3, 2 * RATE, 0.4, 2)]
    variants: Role = {
        f"sum of KL, lambda {clm_weight:.3g}, rate {rate:g}, decay {decay:g}, "
        f"{times * grid.epochs} epochs": planner.train(
            "sum of KL",
            planner.sources,
            epochs=times * grid.epochs,
            **mean | {"clm_weight": clm_weight, "rate": rate, "weight_decay": decay},
        )
        for clm_weight, rate, decay, times in tried
    }
    # With what is best for fusion, the copy included.
    epochs, weight = (24, 0.2) if is_wide else (grid.epochs, 0.3)
    with_copy = planner.train(
        "sum of KL, copy",
        _add_copy(planner),
        epochs=epochs,
        **mean | (FAST if grid.epochs > 2 else {}) | {"clm_weight": weight},
    )
    name = f"sum of KL and the copy, lambda {weight:g}, {epochs} epochs"
    return {"sum_kl": variants, "sum_kl_copy": {name: with_copy}}


def _plan_rivals(planner: Planner, grid: Grid) -> Role:
    return {
        f"{loss}, {_few_epochs(grid)} epochs, rate {rate:g}": planner.train(
            loss,
            planner.sources,
            loss=loss,
            epochs=_few_epochs(grid),
            align=TOP_16["align"],
            fuse={"method": "min_ce", "unit": "row"},
            rate=rate,
        )
        for loss in ("uld", "gold")
        for rate in (RATE, RATE / 4)
    }
