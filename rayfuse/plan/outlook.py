"""What fusion can be expected to gain: the most similar regime of the study (benchmarks/fusion)."""

import importlib.resources
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rayfuse.plan.inputs import PlanInputs

STUDY = importlib.resources.files("rayfuse.plan") / "study.json"
"""The regimes and their results, written by `benchmarks.fusion.regimes`."""

FAR = 2.0
"""Distance of `find_nearest` beyond which no regime is similar."""

LITTLE_TEXT = 0.15
"""Tokens per parameter of the target below which text is worth reading many times: R1 has 0.11."""


@dataclass(frozen=True)
class Regime:
    """A situation of the study, and what fusion gained in it."""

    name: str
    situation: str
    tokens_per_parameter: float
    epochs: int
    """Of the variant that was chosen."""
    advantage: float
    """Share by which the NLL of the best source is below that of the untouched target."""
    gain: tuple[float, float, float]
    """Share by which bits per byte are below those of CLM at its best: value, low, high."""
    token_multiple: tuple[float, float, float] | None
    """Times the text that CLM needs for the result of fusion, if it was measured."""
    seeds: int
    """Of the gain."""
    token_multiple_seeds: int


def read_study() -> list[Regime]:
    """Read the regimes of the study."""
    found = json.loads(STUDY.read_text(encoding="utf-8"))
    return [
        Regime(
            name=name,
            situation=regime["situation"],
            tokens_per_parameter=regime["tokens_per_parameter"],
            epochs=regime["epochs"],
            advantage=regime["advantage"],
            gain=tuple(regime["gain"]),
            token_multiple=tuple(regime["token_multiple"]) if regime["token_multiple"] else None,
            seeds=regime["seeds"],
            token_multiple_seeds=regime["token_multiple_seeds"],
        )
        for name, regime in found.items()
    ]


def describe_outlook(inputs: PlanInputs) -> Iterator[str]:
    """Yield sentences: the regime that a run is in, the gain there, and settings to try."""
    train = inputs.recipe.train
    tokens = inputs.corpus.num_bytes / inputs.target.bytes_per_token
    ratio = tokens / inputs.target.size.parameters
    advantage = inputs.advantage
    regime, distance = find_nearest(ratio, advantage)
    yield (
        f"the corpus has {ratio:.2g} tokens per parameter of the target and is read "
        f"{_times(train.epochs)}; {_describe_advantage(advantage)}"
    )
    if distance > FAR:
        yield "no regime of the study is similar, so that no gain can be named"
        return
    yield (
        f"the nearest regime of the study is {regime.name} ({regime.situation}: "
        f"{regime.tokens_per_parameter:.2g} tokens per parameter, read {_times(regime.epochs)}, "
        f"best source {_compare(regime.advantage)}): {_describe_gain(regime)}; its models have a "
        "million parameters, and nothing larger was measured"
    )
    may_gain = advantage is None or advantage > 0
    is_free = inputs.recipe.fusion != "paper"  # which sets one epoch
    if ratio < LITTLE_TEXT and train.epochs < regime.epochs / 2 and may_gain and is_free:
        yield (
            f"so little text is worth reading more often: train.epochs={regime.epochs}, with "
            "train.publish=best, so that the best validation is kept"
        )


def find_nearest(tokens_per_parameter: float, advantage: float | None) -> tuple[Regime, float]:
    """Find the regime with the most similar amount of text and, if known, strength of sources.

    Returns:
        The regime, and its distance: 1 for twice the text, or for 5 % of NLL.
    """

    def distance(regime: Regime) -> float:
        text = abs(math.log2(max(tokens_per_parameter, 1e-9) / regime.tokens_per_parameter))
        strength = 0.0 if advantage is None else abs(advantage - regime.advantage) / 0.05
        return text + strength

    nearest = min(read_study(), key=distance)
    return nearest, distance(nearest)


def _describe_advantage(advantage: float | None) -> str:
    if advantage is None:
        return (
            "how the sources compare with the target is known once they are captured together with "
            "the target's own copy as a source"
        )
    return f"the best source is {_compare(advantage)} on it"


def _compare(advantage: float) -> str:
    return f"{abs(advantage):.1%} {'better' if advantage > 0 else 'worse'} than the target"


def _describe_gain(regime: Regime) -> str:
    value, low, high = regime.gain
    seeds = _count_seeds(regime.seeds)
    gain = f"fused was {value:.1%} better than CLM at its best ({low:.1%} to {high:.1%}, {seeds})"
    if regime.token_multiple is None:
        return gain
    multiple, seeds = regime.token_multiple[0], _count_seeds(regime.token_multiple_seeds)
    return f"{gain}, which needs {multiple:.1f} times the text for that ({seeds})"


def _count_seeds(number: int) -> str:
    return f"{number} seed" + "s" * (number != 1)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
