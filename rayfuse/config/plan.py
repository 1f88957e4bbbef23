"""The assumptions behind `rayfuse plan`: each a setting with its unit, its default and its source.

All are rough until `rayfuse plan --probe` has measured those it can; prices change by the month.
"""

from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rayfuse.config.base import Settings, Share

PositiveShare = Annotated[float, Field(gt=0, le=1)]


class GpuKind(Settings, json_schema_extra={"required": []}):
    """One GPU type, by Ray's name. `GPU_KINDS` has the figures of the known types."""

    peak_tflops: PositiveFloat
    """Peak of dense 16-bit matrix products, in 10^12 operations per second."""
    memory_gib: PositiveFloat
    """Memory available to programs, in GiB."""
    spot_dollars: NonNegativeFloat
    """Price of a GPU-hour on a spot node, its share of CPUs and memory included."""
    on_demand_dollars: NonNegativeFloat
    """Price of a GPU-hour on an on-demand node."""
    has_bfloat16: bool = True
    """Whether it computes in bfloat16, the default of models on GPUs."""
    forward_share: PositiveShare | None = None
    """Replaces plan.forward_share for this GPU type."""
    train_share: PositiveShare | None = None
    """Replaces plan.train_share for this GPU type."""


GPU_KINDS: dict[str, dict[str, Any]] = {
    "T4": {
        "peak_tflops": 65,
        "memory_gib": 14.6,
        "spot_dollars": 0.2,
        "on_demand_dollars": 0.53,
        "has_bfloat16": False,
    },
    "L4": {"peak_tflops": 121, "memory_gib": 22, "spot_dollars": 0.35, "on_demand_dollars": 0.8},
    "A10G": {"peak_tflops": 70, "memory_gib": 22, "spot_dollars": 0.45, "on_demand_dollars": 1.01},
    "A100": {"peak_tflops": 312, "memory_gib": 39.4, "spot_dollars": 1.5, "on_demand_dollars": 2.7},
    "H100": {"peak_tflops": 989, "memory_gib": 79, "spot_dollars": 3.5, "on_demand_dollars": 6.9},
    "H200": {"peak_tflops": 989, "memory_gib": 139, "spot_dollars": 4.5, "on_demand_dollars": 7.9},
}
"""Peaks and memories from the makers' data sheets. Prices: AWS in us-east, the smallest or only
instance with that GPU divided by its GPUs (g4dn, g6, g5, p4d, p5, p5en), as of mid 2025 and from
memory: look yours up."""


def _fill_kinds(value: object) -> object:
    """Merge figures with the defaults: `gpus: {H100: {spot_dollars: 2}}` changes one figure."""
    if not isinstance(value, dict):
        return value
    given = cast(dict[str, Any], value)
    filled: dict[str, Any] = {}
    for kind, figures in (GPU_KINDS | given).items():
        known = GPU_KINDS.get(kind, {})
        filled[kind] = known | figures if isinstance(figures, dict) else figures
    return filled


GpuKinds = Annotated[
    dict[str, GpuKind], BeforeValidator(_fill_kinds, json_schema_input_type=dict[str, GpuKind])
]


class SizeSettings(Settings):
    """The size of a model whose files are missing or shall not be read."""

    parameters: PositiveFloat
    """Weights, those of embedding and head included."""
    layers: PositiveInt | None = None
    """Number of layers; by default that of such a Llama, (parameters / 196,608) ** (1/3)."""
    width: PositiveInt | None = None
    """Width of a hidden state; by default 128 per layer, as in Llama."""
    vocab: PositiveInt = 32_000
    """Rows of the head."""
    is_tied: bool = False
    """Whether embedding and head are one matrix."""
    bytes_per_token: PositiveFloat | None = None
    """Bytes of text in one of its tokens; by default plan.bytes_per_token."""


class PlanSettings(Settings):
    """The assumptions of `rayfuse plan`; they do not change what a run computes."""

    tokens: PositiveFloat | None = None
    """Target tokens of the corpus, in place of an estimate from file sizes."""
    row_tokens: PositiveFloat | None = None
    """Mean tokens of a row, for attention's cost; by default as found in the documents, else
    corpus.max_tokens."""
    models: dict[str, SizeSettings] = Field(default_factory=dict[str, SizeSettings])
    """Sizes by a source's name or `target`, in place of those of the models' files."""
    gpus: GpuKinds = Field(default_factory=lambda: {k: GpuKind(**v) for k, v in GPU_KINDS.items()})
    """GPU types: speed, memory and price."""

    bytes_per_token: PositiveFloat = 4.0
    """Bytes of text in a token, if documents and tokenizers are not available to count. Source:
    English in the Llama and GPT-2 vocabularies."""
    unpacked_ratio: PositiveFloat = 3.0
    """Bytes of text in one byte of a Parquet or compressed file. Source: 50 MB of text in seven
    domains, 3.2 by gzip."""

    forward_share: PositiveShare = 0.45
    """Share of a GPU's peak that capture and evaluation reach in the model. Source: assumed, usual
    for 7B models; `--probe` measures it."""
    train_share: PositiveShare = 0.35
    """Share of a GPU's peak that a training step reaches. Source: assumed, usual for 7B models with
    ZeRO; `--probe` measures it."""
    pipeline_share: PositiveShare = 0.97
    """Share of the bare forward loop's speed that capture on Ray keeps. Source:
    benchmarks/RESULTS.md, 0.968."""
    fused_step_ratio: PositiveFloat = 1.02
    """Time of a fused step over that of a plain one. Source: benchmarks/RESULTS.md, 0.98 to
    1.02."""
    start_minutes: NonNegativeFloat = 10.0
    """Minutes until a GPU computes, billed for each GPU: start of the node, image, weights. Source:
    assumed."""
    spot_lost_share: Share = 0.05
    """Share of the work on spot nodes that is repeated because a node was lost. Source: assumed."""

    corpus_bytes_per_byte: PositiveFloat = 0.9
    """Bytes that the corpus stores for a byte of text: the text and its target tokens. Source: six
    domains of text, gpt2 and phi-3 tokens, 0.91."""
    captured_bytes_per_token: NonNegativeFloat = 5.0
    """Bytes of a captured position without its entries. Source: benchmarks/RESULTS.md, 4.9."""
    captured_bytes_per_entry: PositiveFloat = 1.4
    """Bytes of one captured top-k entry. Source: benchmarks/RESULTS.md: at k 10, 16 and 32 this is
    2 to 15 % above the larger of two models, at k 64 it is 4 % below; up to 2.0 for synthetic text
    and a vocabulary of 128k."""
    captured_bytes_per_draw: PositiveFloat = 1.6
    """Bytes of one captured draw. Source: benchmarks/RESULTS.md, 1.1 to 1.8."""
    aligned_bytes_per_token: NonNegativeFloat = 6.5
    """Bytes of an aligned position without its entries. Source: stories260k in phi-3's tokens,
    6.3."""
    aligned_bytes_per_entry: PositiveFloat = 1.6
    """Bytes of one aligned entry. Source: stories260k in phi-3's tokens, 1.57."""
    checkpoint_bytes_per_weight: PositiveFloat = 14.0
    """Bytes of a checkpoint for each weight: bfloat16, its float32 copy and two moments. Source:
    DeepSpeed's bfloat16 optimiser."""
    upload_part_bytes: PositiveFloat = 52_428_800.0
    """Bytes of a large file that one request uploads. Source: s3fs."""

    tokenize_bytes_per_core_second: PositiveFloat = 700_000.0
    """Bytes of text that a core splits into rows in a second, for one tokenizer. Source: two
    tokenizers at 350,000 on a slow shared core."""
    align_tokens_per_core_second: PositiveFloat = 1_000_000.0
    """Target tokens that a core aligns in a second by `bytes` or `exact`. Source:
    benchmarks/RESULTS.md, 1.1 to 3.0 million."""
    mapped_tokens_per_core_second: PositiveFloat = 127_000.0
    """Target tokens that a core aligns in a second by `min_edit_distance` or `cooccurrence`.
    Source: benchmarks/RESULTS.md, `min_edit_distance`."""

    dollars_per_core_hour: NonNegativeFloat = 0.045
    """Price of a CPU core for an hour, for corpus and alignment. Source: general-purpose nodes on
    demand, rough."""
    dollars_per_gb_month: NonNegativeFloat = 0.023
    """Price of storing 10^9 bytes for a month. Source: S3 standard, us-east, as of mid 2025, from
    memory."""
    dollars_per_million_puts: NonNegativeFloat = 5.0
    """Price of 10^6 PUT and LIST requests. Source: as for dollars_per_gb_month."""
    dollars_per_million_gets: NonNegativeFloat = 0.4
    """Price of 10^6 GET requests. Source: as for dollars_per_gb_month."""

    usable_memory_share: PositiveShare = 0.9
    """Share of a GPU's memory for weights and activations. Source: assumed; the CUDA driver and
    fragmentation use the rest."""
    forward_bytes_per_unit: PositiveFloat = 32.0
    """Bytes of activations of a forward pass, for each token of a batch and unit of width, one
    layer at a time. Source: counted for a Llama layer in 16 bits."""
    train_bytes_per_unit: PositiveFloat = 34.0
    """Bytes of activations of a training step, for each token, layer and unit of width, without the
    attention matrix. Source: Korthikanti et al. 2022 (arXiv 2205.05198), equation 1."""
    optimiser_bytes_per_weight: PositiveFloat = 12.0
    """Bytes of AdamW's state for each weight: a float32 copy and two moments. Source: counted."""
