"""Whether fusion improved on CLM in this run, as the report's first sentence, and if not, why."""

from collections.abc import Iterator

from rayfuse.config.recipe import Recipe
from rayfuse.config.train import value_at
from rayfuse.evaluate.bootstrap import MIN_DOCUMENTS
from rayfuse.evaluate.scores import ALL, bits_per_byte
from rayfuse.report.gather import Findings
from rayfuse.train.order import ENOUGH_STEPS

LOW_SIGNAL_SHARE = 0.8
"""Below it, a fifth of the text teaches as in CLM. Common pairs of tokenizers have 0.85 to 1."""

HIGH_TAIL_MASS = 0.15
"""Above it, the sources' opinion on one token in seven is not stored."""

HIGH_LAMBDA = 0.7
"""From it on, less than a third of the loss is the sources'."""


def state_gain(findings: Findings, recipe: Recipe) -> str | None:
    """State whether fusion improved on CLM here, by how much, and if not, which reasons apply.

    Returns:
        None where the run has no CLM baseline.
    """
    if "clm" not in findings.differences:
        return None
    difference = findings.differences["clm"][ALL]
    compared = _name_comparison(findings, recipe)
    if difference.num_documents < MIN_DOCUMENTS:
        return (
            f"Whether fusion helped is unknown: {difference.num_documents} held-out documents are "
            f"too few to compare it with {compared}."
        )
    figures = _format_gain(findings, "clm", f"bits per byte against {compared}")
    if difference.outcome == "better":
        return f"Fusion helped: {figures}.{_compare_untouched(findings)}"
    start = "Fusion did not help" if difference.outcome == "worse" else "No clear gain from fusion"
    reasons = "; ".join(find_reasons(findings, recipe))
    return f"{start}: {figures}. {f'Likely reasons: {reasons}.' if reasons else NO_REASON}"


NO_REASON = "None of the known reasons applies."


def find_reasons(findings: Findings, recipe: Recipe) -> Iterator[str]:
    """Yield the known reasons for little gain that apply to a run, each with its value."""
    train = recipe.train
    scores = {
        name: bits_per_byte(model.documents)[ALL] for name, model in findings.evaluations.items()
    }
    sources = [name for name, model in findings.evaluations.items() if model.role == "source"]
    best = min(sources, key=lambda name: scores[name], default="clm")
    are_all = len(sources) == len(recipe.sources)  # imported ones are not evaluated
    if are_all and scores[best] >= scores["clm"]:
        yield (
            f"no source knows this text better than CLM ({best}, the best, has "
            f"{scores[best]:.4f} bits per byte, CLM {scores['clm']:.4f})"
        )
    if train.epochs == 1:
        yield (
            "the text is read one time (train.epochs is 1), and soft labels gain on hard ones as "
            "it is repeated"
        )
    shares = {name: signal.share for name, signal in findings.signals.items()}
    if shares and max(shares.values()) < LOW_SIGNAL_SHARE:
        yield f"no source has a signal at more than {max(shares.values()):.0%} of positions"
    tails = [signal.tail_mass for signal in findings.signals.values() if signal.with_signal]
    if tails and recipe.fuse.tail == "bucket" and sum(tails) / len(tails) > HIGH_TAIL_MASS:
        yield (
            f"{sum(tails) / len(tails):.0%} of the sources' probability lies outside their stored "
            "entries, and is not learned (raise capture.top_k, or with backend transformers set "
            "capture.signal to top_k_and_sampled_tail)"
        )
    mean_lambda = (value_at(train.clm_weight, 0.0) + value_at(train.clm_weight, 1.0)) / 2
    if mean_lambda >= HIGH_LAMBDA:
        yield f"lambda is {mean_lambda:g} on average, so that the sources have little weight"
    curve = findings.curves.get("fused")
    if curve is not None and curve.steps[-1] < ENOUGH_STEPS:
        yield (
            f"training had {curve.steps[-1]} steps, fewer than {ENOUGH_STEPS} (lower "
            "train.rows_per_step, or raise train.epochs)"
        )


def _compare_untouched(findings: Findings) -> str:
    """Compare fused with the untouched target where CLM is worse than that: a gain on CLM alone
    would flatter fusion.
    """
    clm, target = (
        bits_per_byte(findings.evaluations[name].documents)[ALL] for name in ("clm", "target")
    )
    if clm <= target:
        return ""
    gain = _format_gain(findings, "target", "against the untouched target")
    return f" Without fusion, training on this text made the target worse; fused is {gain}."


def _format_gain(findings: Findings, name: str, words: str) -> str:
    """Format the difference of fused from a model as a share of the model's bits per byte."""
    score = bits_per_byte(findings.evaluations[name].documents)[ALL]
    difference = findings.differences[name][ALL]
    value, low, high = (
        _format_share(bits / score)
        for bits in (difference.difference, difference.low, difference.high)
    )
    return f"{value} {words} (95\u00a0% interval {low} to {high})"


def _name_comparison(findings: Findings, recipe: Recipe) -> str:
    rate, own = recipe.train.learning_rate, recipe.train.baseline_learning_rate
    if own is None:
        rates = f"at the same learning rate ({rate:g})"
    else:
        rates = f"at learning rates of their own (CLM {own:g}, fused {rate:g})"
    if findings.has_selection:
        return f"CLM {rates}, each at its best validation"
    epochs = recipe.train.epochs
    return f"CLM {rates}, after the same {'epoch' if epochs == 1 else f'{epochs} epochs'}"


def _format_share(value: float) -> str:
    return f"{value:+.2%}".replace("-", "\u2212").replace("%", "\u00a0%")
