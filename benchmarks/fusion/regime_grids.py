"""The regimes: their models and text, and the epochs and learning rates that are tried in each."""

from dataclasses import dataclass, replace

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
    "R4": Grid(1, (1,), (RATE, *LOW_RATES), ()),
    "tiny": Grid(2, (1,), (RATE / 2,), (RATE / 2,)),
}
GRIDS["R3"] = GRIDS["R1"]
