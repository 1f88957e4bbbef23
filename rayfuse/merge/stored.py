"""Find, count and check what `rayfuse merge` has stored: targets, merges and their scores."""

from collections.abc import Iterator
from dataclasses import replace

from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.results import find_corrupt_results
from rayfuse.merge.plan import MergePlan, NothingToMergeError, plan_merge
from rayfuse.run.layout import Layout
from rayfuse.run.made_models import DONE_FILE, find_faults, find_faults_of_model
from rayfuse.storage.seal import ShardError, unseal
from rayfuse.storage.verify import CorruptFile, Verified


def find_started(recipe: Recipe, layout: Layout) -> MergePlan | None:
    """Plan the merges of a recipe if any target or merge is stored.

    None also where there is nothing to merge, or where a record of aligned rows is corrupt, which
    decides the names: verifying the rows reports that.

    Args:
        recipe: The recipe, without the sources that have failed.
        layout: Its run.

    Raises:
        UserError: A setting of `merge` does not fit the sources.
    """
    try:
        plan = plan_merge(recipe, layout)
    except (NothingToMergeError, ShardError):
        return None
    folders = [*(pair.run.folder for pair in plan.pairs), *map(plan.folder_of, plan.merges)]
    return plan if any(layout.store.sizes(folder, DONE_FILE) for folder in folders) else None


def describe_started(recipe: Recipe, layout: Layout) -> str | None:
    """Describe how many targets and merges are complete, for the status; None if none is stored.

    Raises:
        UserError: A setting of `merge` does not fit the sources.
        ShardError: A record is corrupt.
    """
    plan = find_started(recipe, layout)
    if plan is None:
        return None
    trained = sum(pair.is_trained() for pair in plan.pairs)
    merged = len(plan.merges) - len(plan.list_unmerged())
    return f"{trained} of {len(plan.pairs)} targets, {merged} of {len(plan.merges)} merges"


def verify_merges(recipe: Recipe, layout: Layout) -> dict[str, Verified]:
    """Read and check all that `rayfuse merge` has stored; return the results by label.

    Args:
        recipe: The recipe, without the sources that have failed.
        layout: Its run.

    Raises:
        UserError: A setting of `merge` does not fit the sources.
    """
    plan, store = find_started(recipe, layout), layout.store
    if plan is None:
        return {}
    checks = {f"train {pair.run.name}": find_faults(pair.layout, pair.run) for pair in plan.pairs}
    checks |= {
        f"model {name}": find_faults_of_model(store, plan.folder_of(name), plan.read_inputs)
        for name in plan.merges
    }
    checks["scores of merges"] = _find_corrupt_scores(plan)
    return {
        label: Verified(label, 0, [CorruptFile(file, reason) for file, reason in faults], [])
        for label, faults in checks.items()
    }


def _find_corrupt_scores(plan: MergePlan) -> Iterator[tuple[str, str]]:
    """Yield corrupt and stale scores of the plan's own models, and corrupt results."""
    layout, store = plan.layout, plan.layout.store
    own = {*(pair.run.name for pair in plan.pairs), *plan.merges}
    scores = {name: file for name, file in layout.evaluation.scores.items() if name in own}
    evaluation = replace(layout.evaluation, scores=scores)
    yield from find_corrupt_results(replace(layout, evaluation=evaluation))
    try:
        unseal(store.read(plan.results_file), f"{store.root}/{plan.results_file}")
    except FileNotFoundError:
        return
    except ShardError as error:
        yield plan.results_file, str(error)
