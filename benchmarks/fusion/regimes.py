"""When does fusion pay? The same models in several situations of text and strength.

    python -m benchmarks.fusion.regimes --out DIR [--regimes R0 R1 ...] [--only-choose]

R0 is the study's own situation, R1 a small corpus and strong sources, R2 a weak target on the same
corpus, R3 is R1 with text that the sources write, R4 strong sources and ample text. Each role (CLM,
the target's own copy, other libraries' losses, fusion) has several variants: many in R1, and in the
other regimes those that were among the best there. All are trained for the first seed, the one with
the lowest loss on the selection half is chosen, and only that one is trained for the other seeds
and reported. The reported half is text that is reserved for it: no model is trained on it. The
split of the text and the sources are the same for all seeds; a seed decides the target, the corpus
and the order.

DIR/regimes.json, RESULTS.md and results.jsonl.gz are written at the end, from the seeds that are
done; the folder `regime_results` holds the latest. Results are stored as by `benchmarks.fusion`, so
that a killed run resumes.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.fusion.regime_grids import REGIMES, SEEDS
from benchmarks.fusion.regime_plan import Role, plan_costs, plan_regime
from benchmarks.fusion.regime_report import choose_variants, write_regimes
from benchmarks.fusion.units import (
    Unit,
    forget_scores_alone,
    restore_results,
    run_units,
    save_results,
)
from benchmarks.fusion.work import work

RESULTS = Path(__file__).parent / "regime_results" / "results.jsonl.gz"
"""The scores that are known: copied here from DIR, they are not computed again."""


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
        _run_regime(name, plans_of[name], given)
    shown = [name for name in REGIMES if name != "tiny" or name in given.regimes]
    costs = {name: _list_costs(name, plans_of[name], given.out) for name in shown}
    if RESULTS.is_file():
        restore_results([u for units in costs.values() for u in units], given.out, RESULTS)
    write_regimes({name: plans_of[name] for name in shown}, costs, given.out)
    every += [unit for units in costs.values() for unit in units]
    save_results(every, given.out, given.out / RESULTS.name)


def _run_regime(name: str, plans: dict[int, dict[str, Role]], given: argparse.Namespace) -> None:
    """Run the missing units of the roles that are asked for."""
    first = plans[SEEDS[0]]
    roles = given.roles or list(first)
    unknown = set(roles) - set(first)
    if unknown:
        raise SystemExit(f"--roles {' '.join(sorted(unknown))}: {name} has no such role")
    units = [first["target"]["target"].needs["held_out"]]  # its list of documents is read
    units += [unit for role in roles for unit in first[role].values()]
    run_units(units, given.out, given.data, work, workers=given.workers)
    if given.only_choose:
        return
    chosen = choose_variants(first, given.out)
    finals = [
        plan[role][chosen[role]] for role in roles for plan in plans.values() if role in chosen
    ]
    run_units(finals, given.out, given.data, work, workers=given.workers)
    if not given.roles:
        costs = _list_costs(name, plans, given.out)
        if RESULTS.is_file():
            restore_results(costs, given.out, RESULTS)
        forget_scores_alone(costs, given.out)
        run_units(costs, given.out, given.data, work, workers=given.workers)


def _list_costs(name: str, plans: dict[int, dict[str, Role]], out: Path) -> list[Unit]:
    chosen = choose_variants(plans[SEEDS[0]], out)
    return [unit for seed in SEEDS for unit in plan_costs(name, seed, chosen).values()]


if __name__ == "__main__":
    main()
