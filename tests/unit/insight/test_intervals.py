"""Bootstrap intervals against known cases: their width, their coverage, prompts drawn together."""

import numpy as np
import pytest

from dpo_dist.insight.evaluation import bootstrap_intervals


def each(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64)


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3, 2, 2000)
    found = bootstrap_intervals({"m": (values, np.ones(2000))}, each(2000))
    error = values.std() / np.sqrt(2000)
    assert found["m"] == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.01)


def test_an_interval_covers_the_true_share_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(2), 0
    for seed in range(100):
        right = (generator.random(150) < 0.7).astype(np.float64)
        low, high = bootstrap_intervals({"m": (right, np.ones(150))}, each(150), seed)["m"]
        covered += low <= 0.7 <= high
    assert 88 <= covered <= 100


def test_pairs_of_a_prompt_are_drawn_together() -> None:
    """Each value four times: four times as many pairs, and no more information."""
    values = np.random.default_rng(3).normal(0, 1, 400)
    prompts = np.repeat(each(400), 4)
    (low, high) = bootstrap_intervals({"m": (np.repeat(values, 4), np.ones(1600))}, prompts)["m"]
    alone = bootstrap_intervals({"m": (values, np.ones(400))}, each(400))["m"]
    assert (low, high) == pytest.approx(alone)
    as_if_independent = bootstrap_intervals({"m": (np.repeat(values, 4), np.ones(1600))}, each(1600))["m"]
    assert high - low > 1.8 * (as_if_independent[1] - as_if_independent[0])


def test_a_ratio_of_sums_is_resampled_as_a_ratio() -> None:
    tokens = np.array([1.0, 10, 100, 1000] * 50)
    found = bootstrap_intervals({"m": (-2 * tokens, tokens)}, each(200))
    assert found["m"] == pytest.approx((-2, -2))


def test_the_seed_decides() -> None:
    values = {"m": (np.random.default_rng(4).random(50), np.ones(50))}
    assert bootstrap_intervals(values, each(50)) == bootstrap_intervals(values, each(50))
    assert bootstrap_intervals(values, each(50)) != bootstrap_intervals(values, each(50), seed=1)


def test_a_metric_without_a_count_has_no_interval() -> None:
    ones = np.ones(8)
    counted = {"m": (ones, ones), "rare": (ones, ones * (each(8) == 2)), "none": (ones, 0 * ones)}
    assert bootstrap_intervals(counted, each(8)).keys() == {"m"}
    assert bootstrap_intervals(counted, each(0)) == {}


def test_a_value_that_is_not_finite_leaves_a_metric_without_interval() -> None:
    """Its ends would be nan, which a file of results cannot have."""
    values = {name: np.arange(8.0) for name in ("m", "none", "beyond")}
    values["none"][2], values["beyond"][2] = np.nan, np.inf
    measured = {name: (each_value, np.ones(8)) for name, each_value in values.items()}
    assert bootstrap_intervals(measured, each(8)).keys() == {"m"}


def test_a_few_prompts_have_no_interval() -> None:
    """Five wins of five prompts would have the interval [1, 1], which excludes chance."""
    wins = np.ones(12)
    assert bootstrap_intervals({"m": (wins, wins)}, each(12) % 5) == {}
    assert bootstrap_intervals({"m": (wins, 1.0 * (each(12) < 5))}, each(12)) == {}
    assert bootstrap_intervals({"m": (wins, wins)}, each(12) % 6) == {"m": (1, 1)}


@pytest.mark.parametrize(("outcome", "ends"), [(1.0, (0.7225, 1.0)), (0.0, (0.0, 0.2775))])
def test_equal_outcomes_have_the_interval_of_wilson(outcome: float, ends: tuple[float, float]) -> None:
    """Of ten prompts; pairs of one prompt add nothing. A mean that is no share keeps its resamples."""
    values, prompts = np.full(20, outcome), np.repeat(each(10), 2)
    measured = {"share": (values, np.ones(20)), "mean": (values, np.ones(20))}
    found = bootstrap_intervals(measured, prompts, shares={"share"})
    assert found["share"] == pytest.approx(ends, abs=1e-4)
    assert found["mean"] == (outcome, outcome)
    most = np.concatenate((values[:18], 1 - values[18:]))
    low, high = bootstrap_intervals({"share": (most, np.ones(20))}, prompts, shares={"share"})["share"]
    assert high - low >= ends[1] - ends[0], "nine of ten are no more certain"


@pytest.mark.parametrize(("value", "sides"), [(0, (-1, 1)), (1, (-1, 0)), (-1, (0, 1))])
def test_a_difference_of_equal_outcomes_has_both_signs(value: float, sides: tuple[int, int]) -> None:
    measured = {"m": (np.full(48, float(value)), np.ones(48))}
    found = bootstrap_intervals(measured, each(48), differences={"m"})["m"]
    width = bootstrap_intervals({"m": (np.zeros(48), np.ones(48))}, each(48), shares={"m"})["m"][1]
    assert found == pytest.approx((value + sides[0] * width, value + sides[1] * width))
