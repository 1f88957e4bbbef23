"""The probe on a cluster: each model on a machine of the kind that it is going to run on."""

import time
from typing import Any

import ray
from ray.exceptions import RayError

from rayfuse.plan.probe import Measured, Request, list_probes, run_probe
from rayfuse.recipe import Recipe, SourceSettings
from rayfuse.session import join_cluster


def probe_on_cluster(recipe: Recipe, request: Request) -> list[Measured]:
    """Return what was measured of each source and of training, all at once, within the time."""
    deadline = time.monotonic() + request.seconds
    join_cluster()
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    sources = [_options(source, has_gpus) for source in recipe.sources]
    wanted = recipe.train.gpus_per_worker
    train: dict[str, Any] = {
        "num_cpus": recipe.train.cpus_per_worker,
        "num_gpus": float(has_gpus) if wanted is None else wanted,
    }
    left = max(deadline - time.monotonic(), 0)
    pending = {
        ray.remote(**options, max_retries=0)(_measure).remote(recipe, request, number, left): title
        for number, (options, (title, _)) in enumerate(
            zip([*sources, train], list_probes(recipe, request), strict=True)
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


def _options(source: SourceSettings, has_gpus: bool) -> dict[str, Any]:
    """Return what Ray is asked for, as capture asks for an actor."""
    gpus = float(has_gpus) if source.gpus is None else source.gpus
    options: dict[str, Any] = {"num_cpus": source.cpus, "num_gpus": gpus}
    if source.accelerator_type is not None:
        options["accelerator_type"] = source.accelerator_type
    return options


def _measure(recipe: Recipe, request: Request, number: int, seconds: float) -> Measured | None:
    """Measure one piece of work; run by Ray."""
    deadline = time.monotonic() + 0.8 * seconds  # the answer is to be there in time
    found: list[Measured] = []
    run_probe(*list_probes(recipe, request)[number], deadline, found.append)
    return found[-1] if found else None
