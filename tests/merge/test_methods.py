"""Each merge method is its paper's formula, and VaRM and SCE are calculated by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rayfuse.config.merge import METHODS
from rayfuse.merge.methods import TensorSettings, load_method
from tests.merge.formulas import FORMULAS

PLAIN = TensorSettings(weights=(1.0, 1.0), seeds=(1, 2), t=0.5, scale=0.3, density=0.5, tau=0.5)

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"weights": (1.0, 3.0)},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weights": (0.5, 2.0), "scale": 0.4},
    "ties": {"weights": (1.0, 2.5), "density": 0.4},
    "varm": {},
    "sce": {"tau": 0.3},
}


def draw(num_models: int, shape: tuple[int, ...], seed: int, step: float = 0.1) -> torch.Tensor:
    """Draw a pivot and models that differ from it by about `step`."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn((1 + num_models, *shape), generator=random)
    drawn[1:] = drawn[0] + step * drawn[1:]
    return drawn


def merge(method: str, tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
    pivot, *models = tensors
    if len(models) != 2 and "weights" not in settings:
        settings["weights"] = (1.0,) * len(models)
    settings.setdefault("seeds", tuple(range(len(models))))
    return load_method(method)(pivot, models, replace(PLAIN, **settings))


@pytest.mark.parametrize("step", [1e-4, 0.1, 3.0])
@pytest.mark.parametrize("shape", [(7,), (5, 8), (3, 4, 6)])
@pytest.mark.parametrize("method", [*FORMULAS])
def test_a_merge_is_the_formula_in_float64(method: str, shape: tuple[int, ...], step: float):
    tensors = draw(2, shape, seed=len(shape), step=step)
    pivot, *models = (tensor.double().numpy() for tensor in tensors)
    expected = FORMULAS[method](pivot, models, **SETTINGS[method])
    merged = merge(method, tensors, **SETTINGS[method])
    assert merged.dtype == torch.float32
    # One rounding of float32 in a change, which is at most a few `step`.
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-6)
    wide = merge(method, tensors.double(), **SETTINGS[method])
    np.testing.assert_allclose(wide.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "varm", "sce"])
def test_three_models_are_merged_by_the_same_formula(method: str):
    tensors = draw(3, (6, 9), seed=3)
    settings = SETTINGS[method] | (
        {"weights": (1.0, 0.0, 2.0)} if "weights" in SETTINGS[method] else {}
    )
    pivot, *models = (tensor.double().numpy() for tensor in tensors)
    expected = FORMULAS[method](pivot, models, **settings)
    merged = merge(method, tensors.double(), **settings)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [*METHODS])
def test_models_without_a_change_give_exactly_the_pivot(method: str):
    pivot = draw(1, (4, 5), seed=1)[0]
    merged = merge(method, torch.stack([pivot, pivot, pivot]))
    assert torch.equal(merged, pivot)


@pytest.mark.parametrize("method", ["linear", "varm"])
def test_the_mean_of_one_model_is_exactly_that_model(method: str):
    tensors = draw(1, (4, 5), seed=2, step=1.0)
    assert torch.equal(merge(method, tensors), tensors[1])


def test_all_methods_keep_an_element_that_no_model_has_changed():
    tensors = draw(2, (4, 5), seed=4)
    tensors[1:, 2, 3] = tensors[0, 2, 3]
    for method in METHODS:
        if method != "slerp":  # it turns the tensor as a vector
            assert merge(method, tensors)[2, 3] == tensors[0, 2, 3], method


def test_slerp_keeps_the_norm_of_vectors_of_one_length_and_ends_at_the_models():
    pivot, one, two = torch.eye(3)
    merged = merge("slerp", torch.stack([pivot, one, two]), t=1 / 3)
    assert torch.allclose(merged, torch.tensor([0.0, 3**0.5 / 2, 0.5]))
    for t, end in ((0.0, one), (1.0, two)):
        assert torch.allclose(merge("slerp", torch.stack([pivot, one, two]), t=t), end)


def test_slerp_of_opposite_or_zero_vectors_is_linear():
    one = torch.tensor([3.0, 4.0])
    for two in (-one, torch.zeros(2)):
        merged = merge("slerp", torch.stack([one, one, two]), t=0.25)
        assert torch.allclose(merged, 0.75 * one + 0.25 * two)


def test_ties_elects_the_sign_by_the_weighted_sum_and_plus_at_a_tie():
    pivot = torch.zeros(4)
    one = torch.tensor([1.0, 2.0, -2.0, 0.0])
    two = torch.tensor([-3.0, -2.0, -1.0, 5.0])
    merged = merge("ties", torch.stack([pivot, one, two]), density=1.0)
    assert merged.tolist() == [-3.0, 2.0, -1.5, 5.0]
    merged = merge("ties", torch.stack([pivot, one, two]), density=1.0, weights=(3.0, 1.0))
    # Sums 0 (a tie), 4, -7, 5: the mean is over the models that agree.
    assert merged.tolist() == [1.0, 2.0, -1.75, 5.0]


def test_ties_keeps_the_given_share_also_among_equal_changes():
    pivot, changed = torch.zeros(10), torch.full((10,), -2.0)
    merged = merge("ties", torch.stack([pivot, changed, pivot]), density=0.3)
    assert merged.tolist() == [-2.0] * 3 + [0.0] * 7


def test_dare_is_the_formula_with_its_seeds_masks():
    tensors = draw(2, (6, 7), seed=5)
    pivot, *models = (tensor.double().numpy() for tensor in tensors)
    merged = merge("dare", tensors, weights=(1.0, 3.0), density=0.4, seeds=(8, 9))
    expected = pivot.copy()
    for share, seed, model in zip((0.25, 0.75), (8, 9), models, strict=True):
        drawn = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)).numpy()
        expected += np.where(drawn < np.float32(0.4), share * (model - pivot) / 0.4, 0)
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_dare_depends_on_its_seeds_alone():
    tensors = draw(2, (6, 7), seed=5)
    first = merge("dare", tensors, seeds=(8, 9))
    torch.manual_seed(1)
    assert torch.equal(merge("dare", tensors, seeds=(8, 9)), first)
    assert not torch.equal(merge("dare", tensors, seeds=(8, 10)), first)
    complete = merge("dare", tensors.double(), density=1.0)
    torch.testing.assert_close(complete, merge("linear", tensors.double()), rtol=1e-12, atol=1e-12)


def test_dare_is_the_weighted_mean_on_average():
    tensors = draw(2, (20, 20), seed=6).double()
    num_seeds, density = 400, 0.3
    mean = sum(
        merge("dare", tensors, density=density, seeds=(seed, 10_000 + seed))
        for seed in range(num_seeds)
    )
    expected = merge("linear", tensors)
    # An element's variance over seeds: sum_j (change_j / 2)^2 (1 - density) / density.
    changes = (tensors[1:] - tensors[0]).square().sum(0) / 4
    deviation = (changes * (1 - density) / density / num_seeds).sqrt()
    scores = (mean / num_seeds - expected) / deviation
    assert abs(float(scores.mean())) < 4 / 20  # of 400 elements, 4 standard errors
    assert 0.8 < float(scores.std()) < 1.2


def test_varm_by_hand():
    pivot = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one = torch.tensor([[1.0, 4.0], [3.0, 4.0]])  # mean squared change 4 / 4 = 1
    two = torch.tensor([[1.0, 0.0], [1.0, 6.0]])  # 12 / 4 = 3
    merged = merge("varm", torch.stack([pivot, one, two]))
    # Weights 1/4 and 3/4: (4 + 3 * 0) / 4, (3 + 3 * 1) / 4, (4 + 3 * 6) / 4.
    assert merged.tolist() == [[1.0, 1.0], [1.5, 5.5]]


def test_sce_by_hand():
    pivot = torch.tensor([10.0, 10.0, 10.0, 10.0, 10.0])
    one = torch.tensor([14.0, 11.0, 8.0, 11.0, 10.0])  # changes 4, 1, -2, 1, 0
    two = torch.tensor([8.0, 9.0, 6.0, 11.0, 10.0])  # changes -2, -1, -4, 1, 0
    # Variances 9, 1, 1, 0, 0: 3 are not zero, and tau 0.7 selects int(2.1) = 2: the first and, of
    # the equal ones, the second. Selected: 4, 1 and -2, -1. Weights: 17 / 22 and 5 / 22.
    # Sums 2 and 0: both plus, so that only the first model's changes survive.
    merged = merge("sce", torch.stack([pivot, one, two]), tau=0.7)
    assert merged.tolist() == [14.0, 11.0, 10.0, 10.0, 10.0]
    # tau 1 selects all. Squares 22 and 22: equal weights. Sums 2, 0, -6, 2, 0.
    merged = merge("sce", torch.stack([pivot, one, two]), tau=1.0)
    assert merged.tolist() == [14.0, 11.0, 7.0, 11.0, 10.0]
    # Three models: of the third, changes 0, 3, 0, 0, 0; squares 22, 22, 9 of 53.
    # Sums 2, 3, -6, 2, 0. Second element: (22 * 1 + 9 * 3) / 31; fourth: equal changes.
    three = torch.tensor([10.0, 13.0, 10.0, 10.0, 10.0])
    merged = merge("sce", torch.stack([pivot, one, two, three]), tau=1.0)
    assert merged.tolist() == pytest.approx([14.0, 10 + 49 / 31, 7.0, 11.0, 10.0], rel=1e-6)


def test_sce_weighs_models_also_where_changes_are_tiny():
    """Released code has equal weights where the mean squares sum to less than 1e-6."""
    pivot = torch.zeros(2, dtype=torch.float64)
    one = torch.tensor([2e-5, 1e-5], dtype=torch.float64)
    two = torch.tensor([1e-5, 1e-5], dtype=torch.float64)
    merged = merge("sce", torch.stack([pivot, one, two]), tau=1.0)
    assert merged.tolist() == pytest.approx([(5 * 2e-5 + 2 * 1e-5) / 7, 1e-5], rel=1e-12)
