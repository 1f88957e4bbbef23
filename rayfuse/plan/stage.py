"""The probe on a cluster: each model is measured on a node of the kind that will run it."""

import time
from typing import Any

import ray
from ray.exceptions import RayError

from rayfuse.config.recipe import Recipe
from rayfuse.plan.probe import Measurement, ProbeRequest, list_titles
from rayfuse.runtime.connect import join_cluster
from rayfuse.runtime.resources import count_actor_gpus, count_default_gpus, gpu_options


def probe_on_cluster(recipe: Recipe, request: ProbeRequest) -> list[Measurement]:
    """Measure all sources and training in parallel, and collect the results at the deadline."""
    deadline = time.monotonic() + request.seconds
    join_cluster()
    options: list[dict[str, Any]] = [
        gpu_options(count_actor_gpus(source), source.accelerator_type) | {"num_cpus": source.cpus}
        for source in recipe.run_sources
    ]
    kind, gpus = recipe.train.accelerator_type, recipe.train.gpus_per_worker
    gpus = count_default_gpus(kind) if gpus is None else gpus
    options.append(gpu_options(gpus, kind) | {"num_cpus": recipe.train.cpus_per_worker})
    left = max(deadline - time.monotonic(), 0)
    pending = {
        ray.remote(**resources, max_retries=0)(_measure).remote(
            recipe, request, number, left
        ): title
        for number, (resources, title) in enumerate(zip(options, list_titles(recipe), strict=True))
    }
    ready, late = ray.wait(
        list(pending), num_returns=len(pending), timeout=max(deadline - time.monotonic(), 0)
    )
    for reference in late:
        ray.cancel(reference, force=True)
    found = [_fetch(reference, pending[reference]) for reference in ready]
    return [measurement for measurement in found if measurement is not None]


def _fetch(reference: Any, title: str) -> Measurement | None:
    try:
        return ray.get(reference)
    except RayError as error:
        return Measurement(title, "", None, str(error).splitlines()[0])


def _measure(
    recipe: Recipe, request: ProbeRequest, number: int, seconds: float
) -> Measurement | None:
    """Measure one work item; a Ray task."""
    deadline = time.monotonic() + 0.8 * seconds  # leaves time for the result to reach the driver
    # Imports torch and DeepSpeed, which takes the driver seconds that it does not have.
    from rayfuse.plan.measure import measure_item

    found: list[Measurement] = []
    measure_item(recipe, request, number, deadline, found.append)
    return found[-1] if found else None
