"""What models take of a GPU's memory."""

from rayfuse.config.plan import PlanSettings
from rayfuse.config.recipe import Recipe
from rayfuse.plan.model_size import ModelSize

GIB = 2**30

LOGITS_BYTES, LOGITS_COPIES = 4, 3
"""Of a position's logits, in float32, while they are reduced."""

GPU_CHUNK_POSITIONS = 256
"""What train.chunk_positions is on a GPU."""

WEIGHT_BYTES = 2
"""bfloat16."""


def forward_memory(
    size: ModelSize, batch_tokens: int, chunk_positions: int, plan: PlanSettings
) -> float:
    """Return the bytes that a model takes to score batches: weights, one layer, some logits."""
    activations = batch_tokens * size.width * plan.forward_bytes_per_unit
    logits = chunk_positions * size.vocab * LOGITS_BYTES * LOGITS_COPIES
    return size.parameters * WEIGHT_BYTES + activations + logits


def train_memory(size: ModelSize, recipe: Recipe) -> float:
    """Return the bytes that one worker takes to train a model in bfloat16."""
    train, plan = recipe.train, recipe.plan
    shards = [train.num_workers if train.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    optimiser = 0.0 if train.offload else plan.optimiser_bytes_per_weight / shards[0]
    gradients = WEIGHT_BYTES / shards[1]
    weights = WEIGHT_BYTES / shards[2]
    if train.lora is not None:
        optimiser = gradients = 0.0  # of adapters alone, a hundredth
    tokens = train.micro_batch_sequences * (train.sequence_tokens or recipe.corpus.max_tokens)
    unit = plan.train_bytes_per_unit
    per_layer = WEIGHT_BYTES * size.layers + unit if train.gradient_checkpointing else None
    activations = tokens * size.width * (per_layer or unit * size.layers)
    chunk = train.chunk_positions or GPU_CHUNK_POSITIONS
    logits = chunk * size.vocab * LOGITS_BYTES * LOGITS_COPIES
    return size.parameters * (optimiser + gradients + weights) + activations + logits
