"""The results of a run -> the claims that they support, as sentences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rayfuse.config.recipe import Recipe
from rayfuse.config.text import show_on_one_line
from rayfuse.evaluate.bootstrap import MIN_DOCUMENTS, Difference
from rayfuse.evaluate.scores import ALL, bits_per_byte
from rayfuse.report.gain import state_gain
from rayfuse.report.gather import Findings, SourceSignal
from rayfuse.report.overlap import RUN_WORDS, Overlap
from rayfuse.run.failed_sources import describe_failed
from rayfuse.run.layout import Merge

ROLE_TITLES = {
    "source": "source",
    "ensemble": "mean of the sources",
    "merged": "mean of the weights",
    "target": "untouched target",
    "clm": "same text, no fusion",
    "fused": "fused target",
}
"""Each role in words, for tables."""

OWN_TITLES = {
    "clm": "CLM",
    "target": "the untouched target",
    "ensemble": "the ensemble of the sources",
    "merged": "the merged weights",
}
"""The models other than sources, as sentences name them."""

MINUS = "\u2212"


@dataclass(frozen=True)
class Verdict:
    """The claims that a run's results support."""

    outcome: Literal["won", "lost", "unclear"]
    """`won`: better than every other model; `lost`: worse than at least one."""
    against_clm: Literal["better", "worse", "unclear"] | None
    """Of the headline; None without a CLM baseline, where `outcome` is."""
    headline: str
    """Whether fusion improved on CLM; without a CLM baseline, what fused is better than."""
    sentences: tuple[str, ...]


def judge(findings: Findings, recipe: Recipe) -> Verdict:
    """Judge whether fusion helped, and whether fused is better than all others on held-out text.

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
    notes += _note_imports(recipe)
    notes += note_overlap(findings.overlap, "held-out documents")
    for task, overlap in findings.task_overlap.items():
        notes += note_overlap(overlap, f"questions of {show_on_one_line(task)}")
    if findings.task_overlap_fault is not None:
        reason = show_on_one_line(findings.task_overlap_fault)
        notes.append(f"The questions of the tasks were not compared with the corpus: {reason}.")
    notes += [SELECTION] if findings.has_selection else []
    summary = _summarise(found["better"], found["worse"], found["unclear"])
    gain = state_gain(findings, recipe)
    return Verdict(
        outcome="lost" if found["worse"] else "unclear" if found["unclear"] else "won",
        against_clm=on_all["clm"].outcome if "clm" in on_all else None,
        headline=summary if gain is None else gain,
        sentences=(
            *([] if gain is None else [summary]),
            *describe_failed(findings.failed),
            *pairs,
            *notes,
            CAVEAT,
        ),
    )


NO_BASELINE = (
    "There is no CLM baseline in this run (train.baseline is false), so the effect of fusion "
    "cannot be separated from the effect of training on the text."
)

SELECTION = (
    "The weights of each trained model are those with the lowest bits per byte in a validation on "
    "rows of half of the held-out documents (train.publish is best); models are compared on the "
    "other half alone."
)

CAVEAT = (
    "Intervals cover the choice of held-out documents (paired bootstrap), not the random seed of "
    "training; comparisons are not corrected for their number."
)


def _summarise(better: Sequence[str], worse: Sequence[str], unclear: Sequence[str]) -> str:
    if not worse and not unclear:
        return f"The fused model wins: it is better than {join_names(better)}."
    parts = [f"it is worse than {join_names(worse)}"] if worse else []
    parts += [f"there is no clear difference from {join_names(unclear)}"] if unclear else []
    start = "The fused model did not win" if worse else "The fused model did not clearly win"
    end = f" It is better than {join_names(better)}." if better else ""
    return f"{start}: {' and '.join(parts)}.{end}"


def _compare_pair(findings: Findings, name: str, difference: Difference) -> str:
    fused, other = (
        bits_per_byte(findings.evaluations[model].documents)[ALL] for model in ("fused", name)
    )
    start = f"Against {_title(name)}: {fused:.4f} versus {other:.4f} bits per byte"
    if difference.num_documents < MIN_DOCUMENTS:
        return (
            f"{start}; {difference.num_documents} held-out documents are too few for an interval, "
            "so no claim is made."
        )
    claim = {
        "better": "better",
        "worse": "worse, fusion does not help here" if name == "clm" else "worse",
        "unclear": "no clear difference, the interval includes zero",
    }[difference.outcome]
    return f"{start}, difference {format_difference(difference)}: {claim}."


def _note_domains(differences: dict[str, dict[str, Difference]]) -> list[str]:
    domains = {
        group: difference for group, difference in differences["clm"].items() if group != ALL
    }
    if len(domains) < 2:
        return []
    by_outcome = {
        title: [
            name_domain(name)
            for name, difference in domains.items()
            if difference.outcome == outcome
        ]
        for outcome, title in (
            ("better", "better on"),
            ("worse", "worse on"),
            ("unclear", "no clear difference on"),
        )
    }
    parts = [f"{title} {join_names(names)}" for title, names in by_outcome.items() if names]
    return [f"By domain, against {_title('clm')}: {'; '.join(parts)}."]


def note_tasks(differences: dict[str, dict[str, Difference]]) -> list[str]:
    """Compare fused with each other model over all tasks, in one sentence each."""
    names = order_names({name: None for others in differences.values() for name in others})
    sentences: list[str] = []
    for name in names:
        by_outcome: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
        for task, others in differences.items():
            if name in others:
                by_outcome[others[name].outcome].append(task)
        titles = {"better": "better at", "worse": "worse at", "unclear": "no clear difference at"}
        parts = [f"{titles[key]} {join_names(tasks)}" for key, tasks in by_outcome.items() if tasks]
        sentences.append(f"Tasks, against {_title(name)}: {'; '.join(parts)}.")
    return sentences


def note_merge(merge: Merge) -> list[str]:
    """Explain which sources are excluded from the merged weights, or why there are none."""
    if not merge.excluded:
        return []
    reasons = "; ".join(f"{name}: {reason}" for name, reason in merge.excluded.items())
    if merge.sources:
        return [f"Excluded from the merged weights: {reasons}."]
    return [f"No source's weights can be averaged with the target's ({reasons})."]


def _note_imports(recipe: Recipe) -> list[str]:
    """Note the sources that are not evaluated, as there may be nothing but their predictions."""
    names = [source.name for source in recipe.sources if source.captured_from is not None]
    if not names:
        return []
    return [
        f"Imported and not evaluated, so compared with nothing: {', '.join(names)}; without them, "
        "there is no ensemble."
    ]


def note_noise(signals: dict[str, SourceSignal]) -> list[str]:
    """Name the sources that predict no row better than chance."""
    names = [name for name, signal in signals.items() if signal.is_noise]
    if not names:
        return []
    return [
        f"No better than chance in any row: {join_names(names)}. Fusion skips such sources unless "
        "fuse.skip_noise is false; the ensemble includes them unless fuse.weights sets them to 0."
    ]


def note_overlap(overlap: Overlap, texts: str) -> list[str]:
    """State how many of some texts are in the corpus, where any were compared."""
    if not overlap.documents:
        return []
    part = (
        ""
        if overlap.shards_read == overlap.num_shards
        else f" (its first {overlap.shards_read} shards of {overlap.num_shards})"
    )
    return [
        f"{overlap.shared} of {overlap.documents} {texts} of {RUN_WORDS} or more words share as "
        f"many in a row with the corpus{part}."
    ]


def format_difference(difference: Difference) -> str:
    """Format a difference with its interval and number of documents."""
    return (
        f"{format_signed(difference.difference)} (95 % interval {format_signed(difference.low)} to "
        f"{format_signed(difference.high)}, {difference.num_documents} documents)"
    )


def format_signed(value: float) -> str:
    """Format a number of bits per byte with its sign, a real minus."""
    return f"{value:+.4f}".replace("-", MINUS)


def order_names(names: Iterable[str]) -> list[str]:
    """Sort names of models: the baselines first, CLM before all, then sources."""
    return sorted(names, key=lambda name: (name not in OWN_TITLES, [*OWN_TITLES, name].index(name)))


def join_names(names: Sequence[str]) -> str:
    """Join names as a list in prose."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def name_domain(domain: str) -> str:
    """Name a domain for the reader, on one line; documents without one have the empty name."""
    return show_on_one_line(domain) or "(no domain)"


def _title(name: str) -> str:
    return OWN_TITLES.get(name, f"source {name}")
