"""The fusion study: does fusion work, on which text, and by how much.

    python -m benchmarks.fusion --out DIR [--scale cpu|gpu|tiny] [--data DIR] [--report-only]

Everything is computed from `shared/data`. Units of work that are stored below DIR are not computed
again, so a study that was killed resumes with the same command. DIR/RESULTS.md, its plots and
DIR/numbers.json are written at the end; --report-only writes them from the stored units.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.fusion.findings import gather
from benchmarks.fusion.plan import order_units, plan_seed
from benchmarks.fusion.report import write_report
from benchmarks.fusion.scales import SCALES
from benchmarks.fusion.units import run_units
from benchmarks.fusion.work import work

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def main() -> None:
    """Run the missing units, then write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=__doc__)
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, help="processes; by default those of the scale")
    parser.add_argument("--seeds", type=int, nargs="+", help="run these of the scale's seeds only")
    parser.add_argument("--questions", nargs="+", help="run these questions only")
    parser.add_argument("--report-only", action="store_true")
    chosen = parser.parse_args()
    scale = SCALES[chosen.scale]
    plans = {seed: plan_seed(scale, seed) for seed in scale.seeds}
    if not chosen.report_only:
        wanted = {seed: plans[seed] for seed in chosen.seeds or scale.seeds}
        units = order_units(wanted, chosen.questions)
        run_units(units, chosen.out, chosen.data, work, workers=chosen.workers or scale.workers)
    write_report(gather(scale, plans, chosen.out), chosen.out)
    print(f"{chosen.out}/RESULTS.md")


if __name__ == "__main__":
    main()
