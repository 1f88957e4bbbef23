"""The sizes of a study: models, tokens, text, and the learning rates."""

from dataclasses import dataclass

DOMAINS = ("books", "code", "legal", "math", "multilingual", "web", "wiki")

SEEDS = (1, 2, 3)

OWN_SHARE = 0.88
"""Share of a source's pre-training text that is from its own domains."""


@dataclass(frozen=True)
class Make:
    """One model before fusion: its family, its tokenizer, and its own domains."""

    name: str
    family: str
    tokenizer: str
    """A folder of `shared/data/tokenizers`."""
    own_domains: tuple[str, ...]
    """Empty for an even mixture of all domains."""

    def shares(self) -> tuple[tuple[str, float], ...]:
        """Compute each domain's share of the model's pre-training text."""
        if not self.own_domains:
            return tuple((domain, 1 / len(DOMAINS)) for domain in DOMAINS)
        others = len(DOMAINS) - len(self.own_domains)
        return tuple(
            (domain, OWN_SHARE / len(self.own_domains))
            if domain in self.own_domains
            else (domain, (1 - OWN_SHARE) / others)
            for domain in DOMAINS
        )


SOURCES = (
    Make("llama", "llama", "open-llama-3b", ("books", "multilingual", "wiki")),
    Make("mpt", "mpt", "gpt-neox-20b", ("code", "math")),
    Make("neox", "neox", "gpt2", ("legal", "web")),
)
TARGET = Make("target", "llama", "mistral-7b", ())
EXPERTS = tuple(source.own_domains for source in SOURCES)
"""Own domains of the models that continue the target, and so share its shape, for merging."""


@dataclass(frozen=True)
class Size:
    """Width, depth and pre-training of a model."""

    width: int
    layers: int
    tokens: int
    head_size: int = 32


@dataclass(frozen=True)
class Scale:
    """All sizes of a study."""

    name: str
    vocab_size: int
    """Entries of every truncated tokenizer."""
    max_tokens: int
    """Length of a row, and the models' context length."""
    target: Size
    source: Size
    weak_target_tokens: int
    """Pre-training of the weak target, which all sources are much better than."""
    expert_tokens: int
    pretrain_rows_per_step: int
    pretrain_rate: float
    corpus_bytes: int
    """Size of the fusion corpus per domain."""
    corpus_chars: int
    """Maximum length of a document in it; a few long documents would not represent a domain."""
    multiples: tuple[int, ...]
    """Multiples of the corpus that CLM is trained on, to find where it reaches fusion."""
    rows_per_step: int
    rates: tuple[float, ...]
    """Peak learning rates of continued training that were compared."""
    rate: float
    """The best one for CLM on the selection half; all variants use it."""
    held_out_documents: int
    """Maximum documents of a domain in each half."""
    held_out_chars: int
    """Maximum length of a document; longer ones are truncated."""
    draws: int
    """Draws of sampled records, chosen for the size in bytes of top-16."""
    seeds: tuple[int, ...] = SEEDS
    workers: int = 2
    """Processes, each with one thread on a CPU."""


SCALES = {
    "tiny": Scale(
        name="tiny",
        vocab_size=512,
        max_tokens=64,
        target=Size(32, 1, 16_000, 16),
        source=Size(32, 1, 16_000, 16),
        weak_target_tokens=2_000,
        expert_tokens=4_000,
        pretrain_rows_per_step=8,
        pretrain_rate=5e-3,
        corpus_bytes=1_500,
        corpus_chars=300,
        multiples=(2,),
        rows_per_step=8,
        rates=(2e-3,),
        rate=2e-3,
        held_out_documents=6,
        held_out_chars=200,
        draws=16,
        seeds=(1, 2),
    ),
    "cpu": Scale(
        name="cpu",
        vocab_size=2_048,
        max_tokens=256,
        target=Size(128, 2, 1_000_000),
        source=Size(128, 2, 1_000_000),
        weak_target_tokens=125_000,
        expert_tokens=300_000,
        pretrain_rows_per_step=4,
        pretrain_rate=5e-3,
        corpus_bytes=95_000,
        corpus_chars=3_000,
        multiples=(2, 4),
        rows_per_step=8,
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
        rate=4e-3,
        held_out_documents=48,
        held_out_chars=4_000,
        draws=16,
    ),
    "gpu": Scale(
        name="gpu",
        vocab_size=8_192,
        max_tokens=512,
        target=Size(384, 6, 8_000_000, 64),
        source=Size(384, 6, 8_000_000, 64),
        weak_target_tokens=1_000_000,
        expert_tokens=1_000_000,
        pretrain_rows_per_step=32,
        pretrain_rate=2e-3,
        corpus_bytes=350_000,
        corpus_chars=20_000,
        multiples=(2, 4),
        rows_per_step=32,
        rates=(1.25e-4, 2.5e-4, 5e-4, 1e-3),
        rate=2.5e-4,  # the lowest that was tried; half of it is listed above, but has not been run
        held_out_documents=120,
        held_out_chars=8_000,
        draws=16,
        workers=14,
    ),
}
