"""A run resumes only from checkpoints of an equal run: others have other folders."""

from typing import Any

import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.recipe import Recipe
from rayfuse.config.train import TrainSettings
from rayfuse.run.layout import plan_layout
from tests.run.test_segmentation import folder, write_recipe

__all__ = ["folder"]  # a fixture

OF_FUSION: dict[str, Any] = {
    "clm_weight": 0.7,
    "divergence": "reverse_kl",
    "skew": 0.3,
    "temperature": 2.0,
}
"""Settings that change what is trained by fusion alone."""

OF_CLM: dict[str, Any] = {"baseline_learning_rate": 1e-4}

OF_ALL: dict[str, Any] = {
    "learning_rate": 1e-3,
    "schedule": "linear",
    "final_learning_rate_share": 0.5,
    "warmup_share": 0.5,
    "betas": (0.5, 0.5),
    "epsilon": 1e-3,
    "weight_decay": 0.5,
    "gradient_clipping": 0.5,
    "epochs": 3,
    "rows_per_step": 16,
    "zero_stage": 3,
    "offload": True,
    "lora": {"rank": 2},
    "loss_on": "all",
    "publish": "best",
}

OF_NONE: dict[str, Any] = {
    "pack": False,
    "sequence_tokens": 64,
    "micro_batch_sequences": 4,
    "chunk_positions": 7,
    "num_workers": 2,
    "min_workers": 1,
    "gpus_per_worker": 0.0,
    "cpus_per_worker": 2.0,
    "accelerator_type": "A100",
    "placement": "spread",
    "gradient_checkpointing": True,
    "checkpoint_every_steps": 3,
    "keep_checkpoints": 9,
    "validate_every_steps": 3,
    "validation_rows": 3,
    "trackers": ("tensorboard",),
    "max_failures": 0,
}
"""They change rounding at most, so a run may be resumed with other values."""


def folders(recipe: Recipe) -> dict[str, str]:
    return {run.name: run.folder for run in plan_layout(recipe, ALIGN_FACTS).runs}


@pytest.mark.parametrize("name", [*OF_FUSION, *OF_CLM, *OF_ALL, *OF_NONE])
def test_what_changes_a_training_makes_a_new_one(name, folder, tmp_path):
    recipe = write_recipe(folder, tmp_path, "a")
    values = recipe.train.model_dump(by_alias=False)
    value = {**OF_FUSION, **OF_CLM, **OF_ALL, **OF_NONE}[name]
    assert values[name] != value
    changed = TrainSettings.model_validate(values | {name: value}, by_name=True)
    before, after = folders(recipe), folders(recipe.model_copy(update={"train": changed}))
    new = {run for run in before if before[run] != after[run]}
    expected = {*()} if name in OF_NONE else {"fused"} if name in OF_FUSION else {"fused", "clm"}
    assert new == ({"clm"} if name in OF_CLM else expected)


def test_clm_at_a_rate_of_its_own_is_that_of_a_recipe_with_this_rate(folder, tmp_path):
    recipe = write_recipe(folder, tmp_path, "a")

    def change(**values: float) -> Recipe:
        return recipe.model_copy(update={"train": recipe.train.model_copy(update=values)})

    own, both = change(baseline_learning_rate=1e-3), change(learning_rate=1e-3)
    assert folders(own)["clm"] == folders(both)["clm"]
    assert folders(own)["fused"] == folders(recipe)["fused"] != folders(both)["fused"]
    assert own.train.for_run(is_fused=False).learning_rate == 1e-3
    assert own.train.for_run(is_fused=True).learning_rate == recipe.train.learning_rate


def test_every_setting_is_one_or_the_other():
    # patience needs publish: best; tests/run/test_affects_result.py has both together.
    settled = {*OF_FUSION, *OF_CLM, *OF_ALL, *OF_NONE, "baseline", "patience"}
    assert settled == set(TrainSettings.model_fields)
