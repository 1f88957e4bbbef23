"""The probe on a cluster: each model on a machine of the kind that it is going to run on."""

import time
from typing import Any

import ray
from ray.exceptions import RayError

from rayfuse.config.recipe import Recipe
from rayfuse.plan.probe import Measured, Request, list_probes, run_probe
from rayfuse.runtime.connect import join_cluster
from rayfuse.runtime.resources import count_actor_gpus, count_default_gpus, gpu_options


def probe_on_cluster(recipe: Recipe, request: Request) -> list[Measured]:
    """Return what was measured of each source and of training, all at once, within the time."""
    deadline = time.monotonic() + request.seconds
    join_cluster()
    options: list[dict[str, Any]] = [
        gpu_options(count_actor_gpus(source), source.accelerator_type) | {"num_cpus": source.cpus}
        for source in recipe.sources
    ]
    kind, gpus = recipe.train.accelerator_type, recipe.train.gpus_per_worker
    gpus = count_default_gpus(kind) if gpus is None else gpus
    options.append(gpu_options(gpus, kind) | {"num_cpus": recipe.train.cpus_per_worker})
    left = max(deadline - time.monotonic(), 0)
    pending = {
        ray.remote(**each, max_retries=0)(_measure).remote(recipe, request, number, left): title
        for number, (each, (title, _)) in enumerate(
            zip(options, list_probes(recipe, request), strict=True)
        )
    }
    ready, late = ray.wait(
        list(pending), num_returns=len(pending), timeout=max(deadline - time.monotonic(), 0)
    )
    for each in late:
        ray.cancel(each, force=True)
    return [found for each in ready if (found := _fetch(each, pending[each])) is not None]


def _fetch(reference: Any, title: str) -> Measured | None:
    try:
        return ray.get(reference)
    except RayError as error:
        return Measured(title, "", None, str(error).splitlines()[0])


def _measure(recipe: Recipe, request: Request, number: int, seconds: float) -> Measured | None:
    """Measure one piece of work; run by Ray."""
    deadline = time.monotonic() + 0.8 * seconds  # the answer is to be there in time
    found: list[Measured] = []
    run_probe(*list_probes(recipe, request)[number], deadline, found.append)
    return found[-1] if found else None
