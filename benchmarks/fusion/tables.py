"""The study's tables, in Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.fusion.findings import Findings
from benchmarks.fusion.intervals import Interval, find_multiple
from benchmarks.fusion.plan import CLM, FUSED, TARGET_ALONE
from benchmarks.fusion.scales import DOMAINS, SOURCES
from rayfuse.evaluate.scores import ALL

Records = dict[int, dict[str, Any]]

NOTHING = "not done yet"


def to_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Render a Markdown table."""
    ruler = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ruler, *lines])


def write_interval(interval: Interval) -> str:
    """Format a difference with its interval, in bold where that excludes zero."""
    text = f"{interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
    text = text.replace("-", "\u2212")
    return text if interval.outcome == "unclear" else f"**{text}**"


def write_scores(findings: Findings, models: dict[str, Records]) -> str:
    """Tabulate bits per byte of models, over all and by domain."""
    lines: list[list[str]] = []
    for name, records in models.items():
        scores = findings.score(records)
        cells = [f"{scores[group]:.4f}" for group in (ALL, *DOMAINS)]
        lines.append([name, *cells, str(len(records))])
    return to_table(["model", ALL, *DOMAINS, "seeds"], lines)


def write_against(findings: Findings, ours: Records, others: dict[str, Records]) -> str:
    """Tabulate one variant minus each other one, over all."""
    lines = [
        [name, write_interval(findings.compare(ours, records)[ALL])]
        for name, records in others.items()
    ]
    return to_table(["minus", "bits per byte, all"], lines)


def write_domains(findings: Findings, ours: Records, others: dict[str, Records]) -> str:
    """Tabulate one variant minus some others, by domain."""
    found = {name: findings.compare(ours, records) for name, records in others.items()}
    lines = [
        [group, *(write_interval(intervals[group]) for intervals in found.values())]
        for group in (ALL, *DOMAINS)
    ]
    return to_table(["text", *(f"minus {name}" for name in others)], lines)


def write_variants(findings: Findings, variants: dict[str, Records]) -> str:
    """Tabulate each variant's bits per byte, and minus CLM and rayfuse's default."""
    clm = findings.questions["1"].get(CLM)
    fused = findings.questions["1"].get(FUSED)
    if clm is None or fused is None:
        return NOTHING
    lines: list[list[str]] = []
    for name, records in variants.items():
        against_clm, against_fused = (findings.compare(records, other) for other in (clm, fused))
        wins = [
            sum(against_clm[d].outcome == kind for d in DOMAINS) for kind in ("better", "worse")
        ]
        is_clm, is_default = records == clm, records == fused
        lines.append(
            [
                name + " (default)" * is_default,
                f"{findings.score(records, 'selection')[ALL]:.4f}",
                f"{findings.score(records)[ALL]:.4f}",
                "" if is_clm else write_interval(against_clm[ALL]),
                "" if is_clm else f"{wins[0]} / {wins[1]}",
                "" if is_default else write_interval(against_fused[ALL]),
                str(len(records)),
            ]
        )
    head = ["variant", "selection half", "reported half", "minus CLM", "domains better / worse"]
    return to_table([*head, "minus default", "seeds"], lines)


def write_multiple(findings: Findings) -> str:
    """Write the answer to question 2 as a sentence."""
    records = findings.questions["2"]
    runs = {1: records.get(CLM)} | {
        times: records.get(f"CLM {times}x") for times in findings.scale.multiples
    }
    fused = records.get(FUSED)
    seeds = set(fused or ())
    for run in runs.values():
        seeds &= set(run or ())
    if not seeds or fused is None:
        return NOTHING
    order = sorted(seeds)
    multiple, is_interpolated = find_multiple(
        findings.nats(fused, order, "reported"),
        {times: findings.nats(run, order, "reported") for times, run in runs.items() if run},
        findings.documents["reported"],
    )
    text = (
        f"CLM needs **{multiple.value:.2f} times** the tokens to reach the loss of fusion "
        f"(95 % interval {multiple.low:.2f} to {multiple.high:.2f}; seeds: {len(order)})."
    )
    if not is_interpolated:
        limit = max(findings.scale.multiples)
        text += f" The upper end is extrapolated: no run has more than {limit} times the tokens."
    return text


def write_wins(findings: Findings) -> list[str]:
    """Write the claims of question 1."""
    records = findings.questions["1"]
    ours, clm = records.get(FUSED), records.get(CLM)
    if ours is None or clm is None:
        return [NOTHING]
    against_clm = findings.compare(ours, clm)
    better = [domain for domain in DOMAINS if against_clm[domain].outcome == "better"]
    worse = [domain for domain in DOMAINS if against_clm[domain].outcome == "worse"]
    names = [make.name for make in SOURCES if make.name in records]
    lost = [
        name for name in names if findings.compare(ours, records[name])[ALL].outcome != "better"
    ]
    return [
        f"Fused against CLM on all text: {against_clm[ALL].outcome}.",
        f"Fused against CLM by domain: better in {len(better)} of {len(DOMAINS)} "
        f"({', '.join(better) or 'none'}), worse in {len(worse)} ({', '.join(worse) or 'none'}).",
        f"Fused against every source on all text: better than {len(names) - len(lost)} of "
        f"{len(names)}" + (f", not than {', '.join(lost)}" if lost else "") + ".",
    ]


def order_models(findings: Findings) -> dict[str, Records]:
    """Order the finished models of question 1: sources, ensemble, target, CLM, fused."""
    names = [*(make.name for make in SOURCES), "ensemble", TARGET_ALONE, CLM, FUSED]
    found = findings.questions["1"]
    return {name: found[name] for name in names if name in found}
