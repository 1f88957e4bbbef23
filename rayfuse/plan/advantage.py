"""How much better the sources predict the corpus than the target does, once both are captured."""

import numpy as np
from jaxtyping import Bool, Float

from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe
from rayfuse.run.layout import Layout

MAX_SHARDS = 2
"""Shards that are compared: two million tokens by default."""


def measure_advantage(recipe: Recipe, layout: Layout) -> float | None:
    """Measure by which share the best source's NLL of the corpus is below the target's.

    All sources are compared on the same rows.

    Returns:
        None until a source that is the target's own copy is captured, and another one.

    Raises:
        ShardError: A shard is missing or corrupt.
    """
    target = _name_files(recipe.target)
    # A source that was aligned elsewhere names the target for its tokens alone.
    is_own = [
        source.captured_aligned is None and _name_files(source) == target
        for source in recipe.sources
    ]
    if not any(is_own) or all(is_own):
        return None
    captured = [layout.captured[source.name] for source in recipe.sources]
    shards = set.intersection(
        layout.corpus.list_committed(), *(data.list_committed() for data in captured)
    )
    if not shards:
        return None
    nats = np.concatenate(
        [
            np.stack(
                [
                    data.read_shard(data.read_commit(shard), columns=["nats"])["nats"].to_numpy()
                    for data in captured
                ]
            )
            for shard in sorted(shards)[:MAX_SHARDS]
        ],
        axis=1,
    )
    own = np.array(is_own)
    return _compare(nats, own) if np.isfinite(nats).all(axis=0).any() else None


def _name_files(model: ModelSettings) -> tuple[str | None, ...]:
    return model.model, model.revision, model.adapter, model.adapter_revision


def _compare(
    nats: Float[np.ndarray, "num_sources rows"], own: Bool[np.ndarray, " num_sources"]
) -> float:
    """Compare the NLL of the rows that no source has rejected."""
    totals = nats[:, np.isfinite(nats).all(axis=0)].sum(axis=1)
    return float(1 - totals[~own].min() / totals[own].min())
