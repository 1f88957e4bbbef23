"""Numbers -> the sentences that may be claimed of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rayfuse.evaluate.bootstrap import MIN_DOCUMENTS, Difference
from rayfuse.evaluate.scores import ALL, bits_per_byte
from rayfuse.report.gather import Findings, SourceSignal
from rayfuse.run.layout import Merge

ROLE_TITLES = {
    "source": "source",
    "ensemble": "mean of the sources",
    "merged": "mean of the weights",
    "target": "untouched target",
    "clm": "same text, no fusion",
    "fused": "fused target",
}
"""What each role means, for tables."""

OWN_TITLES = {
    "clm": "CLM",
    "target": "the untouched target",
    "ensemble": "the ensemble of the sources",
    "merged": "the merged weights",
}
"""What the models that are no sources are called in sentences."""

MINUS = "\u2212"


@dataclass(frozen=True)
class Verdict:
    """What the run shows."""

    outcome: Literal["won", "lost", "unclear"]
    """`won`: better than every other model; `lost`: worse than at least one."""
    headline: str
    sentences: tuple[str, ...]


def judge(findings: Findings) -> Verdict:
    """Return whether the fused model beats the others on all held-out text, and how surely.

    A model is better or worse only where the 95 % interval of the difference excludes zero.
    """
    on_all = {name: groups[ALL] for name, groups in findings.differences.items()}
    names = order_names(on_all)
    found = {
        outcome: [_title(name) for name in names if on_all[name].outcome == outcome]
        for outcome in ("better", "worse", "unclear")
    }
    pairs = [_compare_pair(findings, name, on_all[name]) for name in names]
    notes = _note_domains(findings.differences) if "clm" in on_all else [NO_BASELINE]
    notes += note_tasks(findings.task_differences)
    notes += note_merge(findings.merge)
    notes += note_noise(findings.signals)
    return Verdict(
        outcome="lost" if found["worse"] else "unclear" if found["unclear"] else "won",
        headline=_say_headline(found["better"], found["worse"], found["unclear"]),
        sentences=(*pairs, *notes, CAVEAT),
    )


NO_BASELINE = (
    "There is no CLM baseline in this run (train.baseline is false), so what comes from fusion "
    "cannot be told from what comes from training on the text."
)

CAVEAT = (
    "Intervals cover the choice of held-out documents (paired bootstrap), not another seed of "
    "training; each comparison stands alone, without correction for their number."
)


def _say_headline(better: Sequence[str], worse: Sequence[str], unclear: Sequence[str]) -> str:
    if not worse and not unclear:
        return f"The fused model wins: it is better than {join_names(better)}."
    parts = [f"it is worse than {join_names(worse)}"] if worse else []
    parts += [f"there is no clear difference from {join_names(unclear)}"] if unclear else []
    start = "The fused model did not win" if worse else "The fused model did not clearly win"
    end = f" It is better than {join_names(better)}." if better else ""
    return f"{start}: {' and '.join(parts)}.{end}"


def _compare_pair(findings: Findings, name: str, difference: Difference) -> str:
    fused, other = (
        bits_per_byte(findings.evaluations[each].documents)[ALL] for each in ("fused", name)
    )
    start = f"Against {_title(name)}: {fused:.4f} versus {other:.4f} bits per byte"
    if difference.num_documents < MIN_DOCUMENTS:
        return (
            f"{start}; {difference.num_documents} held-out documents are too few for an interval, "
            "so no claim is made."
        )
    claim = {
        "better": "better",
        "worse": "worse, fusion did not win here",
        "unclear": "no clear difference, the interval includes zero",
    }[difference.outcome]
    return f"{start}, difference {say_difference(difference)}: {claim}."


def _note_domains(differences: dict[str, dict[str, Difference]]) -> list[str]:
    domains = {group: each for group, each in differences["clm"].items() if group != ALL}
    if len(domains) < 2:
        return []
    by_outcome = {
        title: [name_domain(name) for name, each in domains.items() if each.outcome == outcome]
        for outcome, title in (
            ("better", "better on"),
            ("worse", "worse on"),
            ("unclear", "no clear difference on"),
        )
    }
    parts = [f"{title} {join_names(names)}" for title, names in by_outcome.items() if names]
    return [f"By domain, against {_title('clm')}: {'; '.join(parts)}."]


def note_tasks(differences: dict[str, dict[str, Difference]]) -> list[str]:
    """Return, against each other model, at which tasks fused is better, worse, or neither."""
    names = order_names({name: None for each in differences.values() for name in each})
    sentences: list[str] = []
    for name in names:
        by_outcome: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
        for task, each in differences.items():
            if name in each:
                by_outcome[each[name].outcome].append(task)
        said = {"better": "better at", "worse": "worse at", "unclear": "no clear difference at"}
        parts = [f"{said[key]} {join_names(tasks)}" for key, tasks in by_outcome.items() if tasks]
        sentences.append(f"Tasks, against {_title(name)}: {'; '.join(parts)}.")
    return sentences


def note_merge(merge: Merge) -> list[str]:
    """Return why there is no model of averaged weights, or which sources it leaves out."""
    if not merge.excluded:
        return []
    reasons = "; ".join(f"{name}: {reason}" for name, reason in merge.excluded.items())
    if merge.sources:
        return [f"The merged weights leave sources out ({reasons})."]
    return [f"No source's weights can be averaged with the target's ({reasons})."]


def note_noise(signals: dict[str, SourceSignal]) -> list[str]:
    """Return which sources know nothing of the corpus."""
    names = [name for name, each in signals.items() if each.is_noise]
    if not names:
        return []
    return [
        f"No better than chance in any row: {join_names(names)}. Fusion leaves such sources out "
        "unless fuse.skip_noise is false; the ensemble has them unless fuse.weights gives them 0."
    ]


def say_difference(difference: Difference) -> str:
    """Return a difference with its interval and the documents behind it."""
    return (
        f"{sign(difference.difference)} (95 % interval {sign(difference.low)} to "
        f"{sign(difference.high)}, {difference.num_documents} documents)"
    )


def sign(value: float) -> str:
    """Return a number of bits per byte with its sign, a real minus."""
    return f"{value:+.4f}".replace("-", MINUS)


def order_names(names: Iterable[str]) -> list[str]:
    """Return names of models with the baselines first, CLM before all, then sources."""
    return sorted(names, key=lambda name: (name not in OWN_TITLES, [*OWN_TITLES, name].index(name)))


def join_names(names: Sequence[str]) -> str:
    """Return names as a list in prose."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def name_domain(domain: str) -> str:
    """Return what a domain is called; documents without one have the empty name."""
    return domain or "(no domain)"


def _title(name: str) -> str:
    return OWN_TITLES.get(name, f"source {name}")
