"""The resources of a task that scores a model."""

from typing import Any

from rayfuse.config.models import ModelSettings, SourceSettings
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.bits_per_byte import CHUNK_POSITIONS
from rayfuse.models.host_memory import GIB, estimate_host_memory
from rayfuse.runtime.resources import (
    TASK_RETRIES,
    count_actor_gpus,
    count_default_gpus,
    gpu_options,
    memory_options,
    reserve_memory,
)


def choose_resources(model: ModelSettings, recipe: Recipe) -> dict[str, Any]:
    """Choose a task's resources: a source's are those of its actors, others' of a train worker."""
    given = None
    if isinstance(model, SourceSettings):
        kind, cpus, gpus = model.accelerator_type, model.cpus, count_actor_gpus(model)
        given = model.memory_gib
    else:
        kind, cpus = recipe.train.accelerator_type, 1.0
        gpus = count_default_gpus(kind)
    needed = estimate_host_memory(
        model,
        batch_tokens=recipe.evaluate.batch_tokens,
        chunk_positions=CHUNK_POSITIONS,
        on_gpu=gpus > 0,
    )
    memory = reserve_memory(
        {"CPU": cpus, "GPU": gpus}, kind, float(needed) if given is None else given * GIB
    )
    options = {"num_cpus": cpus, "max_retries": TASK_RETRIES}
    return options | gpu_options(gpus, kind) | memory_options(memory)
