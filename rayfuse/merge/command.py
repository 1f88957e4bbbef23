"""`rayfuse merge`: fuse the target with each source, merge the results, and choose among them."""

import pkgutil
from dataclasses import replace
from typing import Any

from rich.console import Console

from rayfuse.config.base import UserError
from rayfuse.config.recipe import Recipe
from rayfuse.evaluate.results import is_scored, read_inputs
from rayfuse.merge.plan import MergePlan, check_settings, plan_merge
from rayfuse.merge.results import (
    compare_models,
    print_table,
    read_scores,
    to_values,
    write_results,
)
from rayfuse.pipeline import is_stage_done, prepare_run
from rayfuse.run.failed_sources import describe_failed, drop_sources
from rayfuse.runtime.connect import join_cluster
from rayfuse.runtime.console import ProgressBars
from rayfuse.runtime.progress import Progress

INPUTS = ("corpus", "capture", "align")
"""The stages whose results are merged; they need the most expensive resources, and are shared."""


def merge_recipe(recipe: Recipe, console: Console, *, file: str | None = None) -> dict[str, Any]:
    """Fuse pairwise, merge, score and choose, print the results and return them as plain values.

    What is complete is skipped; an interrupted call resumes.

    Args:
        recipe: The recipe.
        console: Where progress and results are printed.
        file: The recipe's file, for hints.

    Raises:
        UserError: There are fewer than two sources, rows are not captured and aligned, or the
            models cannot be merged.
        ShardError: A shard or a file that is read is missing or corrupt.
    """
    check_settings(recipe)
    layout = prepare_run(recipe)
    recipe = drop_sources(recipe, layout.failed)
    for sentence in describe_failed(layout.failed):
        console.print(sentence, highlight=False)
    for stage in INPUTS:
        if not is_stage_done(stage, layout):
            raise UserError(
                f"stage {stage} is incomplete in {layout.store.root}, and merge starts from "
                f"captured and aligned rows; run `rayfuse run {file or 'RECIPE'}` first, or the "
                "stages corpus, capture and align"
            )
    plan = plan_merge(recipe, layout)
    for name in plan.noise:
        console.print(f"source {name}: skipped as noise (fuse.skip_noise)", highlight=False)
    models = plan.list_models()
    if _is_complete(plan, models):
        console.print("nothing to do: everything is complete", highlight=False)
    else:
        with ProgressBars(console) as bars:
            _make_missing(plan, models, bars)
    settings = recipe.evaluate
    comparison = compare_models(
        read_scores(plan, models), samples=settings.bootstrap_samples, seed=recipe.seed
    )
    values = to_values(plan, comparison)
    write_results(plan, values)
    print_table(plan, comparison, console)
    results = f"{layout.store.root}/{plan.results_file}"
    console.print(f"chosen: {comparison.chosen}, {values['folder']}", highlight=False)
    console.print(f"results: {results}", highlight=False)
    return values | {"results": results}


def _is_complete(plan: MergePlan, models: list[str]) -> bool:
    """Check that nothing is to be trained, merged or scored."""
    layout, scores = plan.layout, plan.layout.evaluation.scores
    return (
        all(pair.is_trained() for pair in plan.pairs)
        and not plan.list_unmerged()
        and all(is_scored(layout.store, scores[n], read_inputs(layout, n)) for n in models)
    )


def _make_missing(plan: MergePlan, models: list[str], progress: Progress) -> None:
    """Train, merge and score what is missing, on the cluster."""
    join_cluster()
    # Imported here: they import ray, which only a process that has joined the cluster may do.
    train_together = pkgutil.resolve_name("rayfuse.train.stage:train_together")
    train_together([(pair.recipe, pair.layout) for pair in plan.pairs], progress)
    pkgutil.resolve_name("rayfuse.merge.stage:merge_models")(plan, progress)
    evaluation, settings = plan.layout.evaluation, plan.recipe.evaluate
    scores = {name: evaluation.scores[name] for name in models}
    layout = replace(plan.layout, evaluation=replace(evaluation, scores=scores))
    text_alone = settings.model_copy(update={"tasks": None})
    recipe = plan.recipe.model_copy(update={"evaluate": text_alone})
    pkgutil.resolve_name("rayfuse.evaluate.stage:evaluate_models")(recipe, layout, progress)
