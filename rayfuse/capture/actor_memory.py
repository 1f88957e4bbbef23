"""The host memory of a capture actor, from its model's files and the sizes of batch and shard."""

from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.models.host_memory import GIB, estimate_host_memory

CALLS_PER_ACTOR = 3
"""Shards in one actor at a time: one is read, one scored, one written."""

ENTRY_BYTES = 16
"""Of an entry of a record in memory, its encoded copy included."""


def estimate_actor_memory(
    source: SourceSettings, settings: CaptureSettings, *, shard_tokens: int, on_gpu: bool
) -> float:
    """Estimate the host memory of an actor in bytes, unless `memory_gib` gives it.

    Args:
        source: The source.
        settings: The capture's settings; the source's own `batch_tokens` count before them.
        shard_tokens: Tokens of the largest shard.
        on_gpu: The actors have GPUs.

    Raises:
        UserError: The model's files cannot be read.
    """
    if source.memory_gib is not None:
        return source.memory_gib * GIB
    entries = settings.kept_entries + settings.num_draws
    return float(
        estimate_host_memory(
            source,
            batch_tokens=min(source.batch_tokens or settings.batch_tokens, max(shard_tokens, 1)),
            chunk_positions=settings.chunk_positions,
            on_gpu=on_gpu,
            kept_bytes=CALLS_PER_ACTOR * shard_tokens * entries * ENTRY_BYTES,
        )
    )
