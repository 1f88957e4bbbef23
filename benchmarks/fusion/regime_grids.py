"""The regimes: their models and text, and the epochs and learning rates that are tried in each."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.fusion.scales import SCALES, Scale, Size

SEEDS = (2, 3, 4)
"""Seed 1 was used up by trials."""

SPLIT_SEED = 2

STRONG = Size(192, 3, 2_000_000)
SMALL = replace(
    SCALES["cpu"],
    source=STRONG,
    corpus_bytes=32_000,
    multiples=(2, 4, 8),
    held_out_documents=10_000,
    seeds=SEEDS,
)

REGIMES: dict[str, Scale] = {
    "R0": replace(SCALES["cpu"], held_out_documents=10_000, seeds=SEEDS),
    "R1": SMALL,
    "R2": replace(SMALL, target=replace(SMALL.target, tokens=SMALL.weak_target_tokens)),
    "R3": SMALL,
    "R4": replace(SMALL, corpus_bytes=320_000, multiples=()),
    "tiny": replace(SCALES["tiny"], seeds=SEEDS),  # for tests
}

WRITTEN_TOKENS = 1_000_000
"""Of R3: tokens of the texts that the sources write."""

RATE = 4e-3
"""The peak learning rate that was best for CLM on the first study's corpus."""


@dataclass(frozen=True)
class Grid:
    """The epochs and learning rates that are tried in a regime, beside R1's wider choice."""

    epochs: int
    """Of variants that learn from distributions."""
    clm_epochs: tuple[int, ...]
    clm_rates: tuple[float, ...]
    multiple_rates: tuple[float, ...]
    """Of CLM on more text, 4 epochs (2 where CLM has few)."""


LOW_RATES = (RATE / 2, RATE / 4, RATE / 8)
MULTIPLE_RATES = (2 * RATE, RATE, RATE / 2, RATE / 4)

GRIDS = {
    "R0": Grid(2, (1, 2, 4), (RATE, *LOW_RATES), (RATE, RATE / 2, RATE / 4)),
    "R1": Grid(8, (2, 4, 8), (RATE, *LOW_RATES, RATE / 16), MULTIPLE_RATES),
    "R2": Grid(8, (4, 8), (RATE, RATE / 2, RATE / 4), MULTIPLE_RATES[:3]),
    "R4": Grid(1, (1,), (2 * RATE, RATE, *LOW_RATES), ()),
    "tiny": Grid(2, (1,), (RATE / 2,), (RATE / 2,)),
}
GRIDS["R3"] = GRIDS["R1"]

BASE: dict[str, Any] = {
    "clm_weight": 0.3,
    "rate": RATE,
    "fuse": {"method": "fixed_share"},
    "align": {"record": "sampled-8+8"},
}
"""The variants of fusion change one of these at a time."""

FAST: dict[str, Any] = {"rate": 2 * RATE, "weight_decay": 0.4}
TOP_16: dict[str, Any] = {"align": {"record": "top-16"}}
WITH_COPY: dict[str, dict[str, Any]] = {
    "": {},
    ", rate 0.008": {"rate": 2 * RATE},
    ", rate 0.008, decay 0.4": FAST,
    ", rate 0.008, sampled 16+16": {"rate": 2 * RATE, "align": {"record": "sampled-16+16"}},
    **{
        f", rate 0.008, decay 0.4, {epochs} epochs": FAST | {"epochs": epochs}
        for epochs in (16, 24)
    },
    **{
        f", rate 0.008, decay 0.4, lambda {weight:g}, {epochs} epochs": FAST
        | {"clm_weight": weight, "epochs": epochs}
        for weight, epochs in ((0.2, 24), (0.1, 32), (0.2, 40))
    },
}
"""What helped the sources alone, tried with the target's own copy among them."""

FALLING = {"start": 0.5, "end": 0.1, "shape": "linear"}
