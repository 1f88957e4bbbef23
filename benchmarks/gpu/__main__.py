"""Measure, record and print; see the package."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import benchmarks.gpu
from benchmarks.gpu.measurements import list_measurements
from benchmarks.gpu.session import Row, measure_all

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "KINETO_LOG_LEVEL": "99"}


def append_row(file: TextIO, row: Row) -> None:
    """Append one line of JSON that survives the end of the process and of the node."""
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())


def format_table(rows: Sequence[Row]) -> str:
    """Format all rows: one line for each measurement, its numbers or its reason below."""
    lines: list[str] = []
    for row in rows:
        lines.append(f"{row['measurement']:44} {row['status']:9} {row['seconds']:6.1f} s")
        if row["status"] != "measured":
            lines.append(f"    {row['reason']}")
        for name, value in row.get("values", {}).items():
            lines.append(f"    {name:42} {_format_value(value)}")
    return "\n".join(lines)


def _format_value(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def main() -> int:
    """Measure all, and return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(
        description=benchmarks.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of measurements' names")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.dry_run:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny products wait for threads
    os.environ.update(ENVIRONMENT | dict(os.environ))
    chosen = [
        measurement
        for measurement in list_measurements(is_dry=given.dry_run)
        if any(part in measurement.name for part in given.only)
    ]
    with given.out.open("a", encoding="utf-8") as file:

        def record(row: Row) -> None:
            append_row(file, row)
            print(
                f"{row['seconds']:6.1f} s  {row['measurement']}: {row['status']}", file=sys.stderr
            )

        rows = measure_all(chosen, seconds=60 * given.minutes, record=record)
    print(format_table(rows))
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
