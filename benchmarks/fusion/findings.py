"""The stored results of a study, gathered for tables and plots."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fusion.intervals import Documents, Interval, Nats, compare_groups, score_groups
from benchmarks.fusion.plan import StudyPlan, order_units
from benchmarks.fusion.scales import Scale
from benchmarks.fusion.text import HALVES
from benchmarks.fusion.units import Unit, list_with_needs


@dataclass(frozen=True)
class Findings:
    """The scores of a study's variants, and the time of their units."""

    scale: Scale
    seeds: tuple[int, ...]
    """The planned seeds."""
    documents: dict[str, Documents]
    """By half."""
    questions: dict[str, dict[str, dict[int, dict[str, Any]]]]
    """Records by question, name and seed."""
    needs: dict[str, list[dict[str, Any]]]
    """Records of all units by kind."""
    cpu_seconds: dict[str, float]
    """By kind of unit, of all seeds."""
    num_missing: int

    def nats(self, records: dict[int, dict[str, Any]], seeds: list[int], half: str) -> Nats:
        """Look up a variant's NLL of each document of a half, by seed."""
        return np.array([records[seed]["nats"][half] for seed in seeds])

    def score(self, records: dict[int, dict[str, Any]], half: str = "reported") -> dict[str, float]:
        """Compute bits per byte, the mean over the seeds that are done."""
        scores = [
            score_groups(np.array(record["nats"][half]), self.documents[half])
            for record in records.values()
        ]
        return {group: float(np.mean([score[group] for score in scores])) for group in scores[0]}

    def compare(
        self,
        ours: dict[int, dict[str, Any]],
        theirs: dict[int, dict[str, Any]],
        half: str = "reported",
    ) -> dict[str, Interval]:
        """Compute the differences between two variants over the seeds that both have."""
        seeds = sorted(set(ours) & set(theirs))
        return compare_groups(
            self.nats(ours, seeds, half), self.nats(theirs, seeds, half), self.documents[half]
        )


def gather(scale: Scale, plans: dict[int, StudyPlan], out: Path) -> Findings:
    """Gather the results of the units that are done.

    Raises:
        ValueError: The held-out text does not exist yet, so nothing is scored.
    """
    every = list_with_needs(order_units(plans))
    done = {unit.key: unit.read(out) for unit in every if unit.is_done(out)}
    held_out = next((unit for unit in every if unit.kind == "held_out"), None)
    if held_out is None or held_out.key not in done:
        raise ValueError(f"nothing is scored below {out} yet; run the study first")
    documents = {
        half: [
            (str(name), str(domain), int(size)) for name, domain, size in done[held_out.key][half]
        ]
        for half in HALVES
    }

    def collect(by_seed: dict[int, dict[str, Unit]]) -> dict[str, dict[int, dict[str, Any]]]:
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for seed, units in by_seed.items():
            for name, unit in units.items():
                if unit.key in done:
                    found.setdefault(name, {})[seed] = done[unit.key]
        return found

    cpu_seconds: dict[str, float] = {}
    needs: dict[str, list[dict[str, Any]]] = {}
    for unit in every:
        if unit.key in done:
            record = done[unit.key]
            cpu_seconds[unit.kind] = cpu_seconds.get(unit.kind, 0.0) + record["cpu_seconds"]
            needs.setdefault(unit.kind, []).append(record)
    return Findings(
        scale=scale,
        seeds=tuple(plans),
        documents=documents,
        questions={
            question: collect({seed: plan[question] for seed, plan in plans.items()})
            for question in next(iter(plans.values()))
        },
        needs=needs,
        cpu_seconds=cpu_seconds,
        num_missing=len(every) - len(done),
    )


def write_numbers(findings: Findings, path: Path) -> None:
    """Write the raw numbers: the NLL of every document under every variant and seed."""

    def shorten(records: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
        return {
            name: {
                str(seed): {
                    "nats": record["nats"],
                    "cpu_seconds": round(record["cpu_seconds"], 1),
                }
                for seed, record in by_seed.items()
            }
            for name, by_seed in records.items()
        }

    content = {
        "scale": asdict(findings.scale),
        "documents": findings.documents,
        "questions": {
            name: shorten(records) for name, records in sorted(findings.questions.items())
        },
        "cpu_seconds": findings.cpu_seconds,
    }
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")
