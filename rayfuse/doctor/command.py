"""`rayfuse doctor`: check the recipe, then the cluster, and print the findings."""

import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.base import first_line
from rayfuse.config.recipe import Recipe
from rayfuse.doctor.checks import Finding, list_findings
from rayfuse.run.layout import plan_layout
from rayfuse.run.prepare import check_weights, list_tokenizer_notes
from rayfuse.runtime.connect import ClusterError, join_cluster
from rayfuse.storage.store import Store, open_store

MAX_RETRY_SECONDS = 20.0
"""Limit of the time that failed storage requests are retried."""


def run_doctor(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Print the findings about a recipe and its cluster, and return them as plain values."""
    findings = examine(recipe)
    print_findings(findings, console)
    return {"findings": [asdict(finding) for finding in findings]}


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print each finding with its remedy, and the number of errors and warnings."""
    for finding in findings:
        style = "red" if finding.severity == "error" else "yellow"
        console.print(f"{finding.severity}: {finding.check}: {finding.text}", style=style)
        console.print(f"  remedy: {finding.remedy}", highlight=False)
    errors = sum(finding.severity == "error" for finding in findings)
    if not findings:
        console.print("no findings")
    else:
        console.print(f"{errors} errors, {len(findings) - errors} warnings", highlight=False)


def examine(recipe: Recipe) -> list[Finding]:
    """List the findings about a recipe and the cluster that will run it, errors first."""
    patience = min(recipe.storage_retry_seconds, MAX_RETRY_SECONDS)
    recipe_to_check = recipe.model_copy(update={"storage_retry_seconds": patience})
    found = _check_recipe(recipe_to_check)
    fault = _join()
    if fault is not None:
        return [*found, fault]
    from rayfuse.doctor.stage import collect_cluster_facts  # ray reads what join_cluster sets

    store = open_store(recipe.storage, patience)
    marker = f".doctor-{uuid.uuid4().hex}"
    fault = _put_marker(store, marker)
    if fault is not None:
        found.append(fault)
    try:
        cluster = collect_cluster_facts(recipe_to_check, marker if fault is None else None)
    finally:
        if fault is None:
            store.remove(marker)
    found += list_findings(recipe, cluster)
    return sorted(found, key=lambda finding: finding.severity != "error")


def _check_recipe(recipe: Recipe) -> list[Finding]:
    try:
        plan_layout(recipe, ALIGN_FACTS)
        check_weights(recipe)
    except (ValueError, OSError) as error:
        return [Finding("recipe", "error", str(error), "change the recipe as the error states")]
    return [
        Finding("tokenizers", "warning", note, "see that the files are those of the model")
        for note in list_tokenizer_notes(recipe)
    ]


def _join() -> Finding | None:
    """Join the cluster; return a finding if that fails."""
    try:
        join_cluster()
    except Exception as error:  # Ray's own classes cannot be imported before join_cluster
        is_rays = type(error).__module__.startswith("ray.")
        if not isinstance(error, ConnectionError | ClusterError) and not is_rays:
            raise
        cause = (error.__cause__ if isinstance(error, ClusterError) else None) or error
        reason = first_line(cause)
        return Finding(
            "cluster",
            "error",
            f"it cannot be joined: {reason}",
            "see that the head runs, that RAY_ADDRESS names it, and that RAY_AUTH_MODE and the "
            "token are the same on both sides",
        )
    return None


def _put_marker(store: Store, marker: str) -> Finding | None:
    """Write a file that all nodes must see; return a finding if that fails."""
    try:
        store.write(marker, b"rayfuse doctor")
    except (OSError, ImportError) as error:
        return Finding(
            "storage",
            "error",
            f"{store.root} cannot be written from here: {error}",
            "give a folder or a bucket that this machine can write too",
        )
    return None
