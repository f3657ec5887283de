"""Results of an evaluation: the same means as the sums, and intervals."""

from dataclasses import fields, replace

import numpy as np
import pytest

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.objective.intervals import bootstrap_intervals
from dpo_dist.objective.metrics import CustomMetrics, MetricPlan, PairValues
from dpo_dist.training.evaluation.results import labelled_columns, results
from dpo_dist.training.evaluation.table import evaluation_table

PAIRS = 40


def invented(seed: int = 0) -> PairValues:
    generator = np.random.default_rng(seed)
    columns = {field.name: generator.normal(-50, 20, PAIRS) for field in fields(PairValues)[:-1]}
    for name in ("tokens_chosen", "tokens_rejected"):
        columns[name] = generator.integers(1, 300, PAIRS)
    columns["margin"] = columns["reward_chosen"] - columns["reward_rejected"]
    columns["custom/longer"] = columns["tokens_rejected"] > columns["tokens_chosen"]
    return PairValues.from_columns({name: column.astype(np.float32) for name, column in columns.items()})


def test_results_by_label_and_length_with_intervals() -> None:
    custom = CustomMetrics(names=("custom/longer",))
    values, plan = invented(), MetricPlan(LossConfig(), ("a", "b"), is_evaluation=True, custom=custom)
    of_a = np.arange(PAIRS) < 25
    means = {"loss": 0.5, "loss/a": 0.4, "loss/b": 0.7, "rewards/margins": 7.0}
    prompts = np.arange(PAIRS, dtype=np.uint64) // 2
    found = results(means, values, {"a": of_a, "b": ~of_a}, prompts, plan, 0)
    assert list(found) == ["all", "a", "b"]
    assert (found["all"]["eval_loss"], found["a"]["eval_loss"], found["b"]["eval_loss"]) == (0.5, 0.4, 0.7)
    assert found["all"]["eval_rewards/margins"] == 7.0, "the exact mean, where there is one"
    assert not any(key.endswith(("/a", "/b")) for key in found["all"])
    assert (found["a"]["eval_pairs"], found["a"]["eval_prompts"]) == (25, 13)
    margins, longer = values.margin[~of_a], np.maximum(values.tokens_chosen, values.tokens_rejected)[~of_a]
    assert found["b"]["eval_rewards/accuracies"] == pytest.approx((margins > 0).mean())
    inside = (longer >= 128) & (longer < 256)
    name = "eval_rewards/margins_by_length/128-255"
    assert found["b"][name] == pytest.approx(margins[inside].mean(), rel=1e-5)
    per_token = values.logp_chosen.sum(dtype=np.float64) / values.tokens_chosen.sum(dtype=np.float64)
    assert found["all"]["eval_logps/chosen_per_token"] == pytest.approx(per_token, rel=1e-5)
    assert found["a"]["eval_custom/longer"] == values.custom["custom/longer"][of_a].mean(dtype=np.float64)
    for row in found.values():
        assert "eval_custom/longer" in row["intervals"]
        for key, (low, high) in row["intervals"].items():
            assert low <= high
            assert key == "eval_rewards/margins" or low <= row[key] <= high
    table = evaluation_table(found)
    assert len(table) == 4
    assert "7.000 [" in table[1]


def test_the_interval_of_a_share_that_all_pairs_have_is_not_a_point() -> None:
    length = np.full(PAIRS, 150, np.float32)
    values = replace(
        invented(), margin=np.ones(PAIRS, np.float32), tokens_chosen=length, tokens_rejected=length
    )
    plan = MetricPlan(LossConfig(), (), is_evaluation=True)
    found = results({}, values, {}, each(PAIRS), plan, 0)["all"]["intervals"]
    for name in ("eval_rewards/accuracies", "eval_rewards/accuracies_by_length/128-255"):
        assert found[name][0] < 0.95, name
        assert found[name][1] == 1.0, name


def each(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64)


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    """Pairs of one prompt are drawn together: each value four times is no more information."""
    values = np.random.default_rng(1).normal(3, 2, 2000)
    found = bootstrap_intervals({"m": (values, np.ones(2000))}, each(2000))["m"]
    error = values.std() / np.sqrt(2000)
    assert found == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.01)
    copies = {"m": (np.repeat(values, 4), np.ones(8000))}
    assert bootstrap_intervals(copies, np.repeat(each(2000), 4))["m"] == pytest.approx(found)
    low, high = bootstrap_intervals(copies, each(8000))["m"]
    assert found[1] - found[0] > 1.8 * (high - low)


def test_a_ratio_of_sums_is_resampled_as_a_ratio_and_the_seed_decides() -> None:
    tokens = np.array([1.0, 10, 100, 1000] * 50)
    found = bootstrap_intervals({"m": (-2 * tokens, tokens)}, each(200))
    assert found["m"] == pytest.approx((-2, -2))
    values = {"m": (np.random.default_rng(4).random(50), np.ones(50))}
    assert bootstrap_intervals(values, each(50)) == bootstrap_intervals(values, each(50))
    assert bootstrap_intervals(values, each(50)) != bootstrap_intervals(values, each(50), seed=1)


def test_a_metric_without_enough_finite_values_has_no_interval() -> None:
    """Five wins of five prompts would have the interval [1, 1], which excludes chance."""
    ones = np.ones(12)
    measured = {"m": (ones, ones), "rare": (ones, ones * (each(12) == 2)), "none": (ones, 0 * ones)}
    measured["five"] = ones, 1.0 * (each(12) < 5)
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        measured[name] = np.where(each(12) == 2, value, 1.0), ones
    assert bootstrap_intervals(measured, each(12)) == {"m": (1, 1)}
    assert bootstrap_intervals(measured, each(12) % 5) == bootstrap_intervals(measured, each(0)) == {}


@pytest.mark.parametrize(("outcome", "ends"), [(1.0, (0.7225, 1.0)), (0.0, (0.0, 0.2775))])
def test_equal_outcomes_have_the_interval_of_wilson(outcome: float, ends: tuple[float, float]) -> None:
    """Of ten prompts; pairs of one prompt add nothing. A mean that is no share keeps its resamples."""
    values, prompts = np.full(20, outcome), np.repeat(each(10), 2)
    measured = {"share": (values, np.ones(20)), "mean": (values, np.ones(20))}
    found = bootstrap_intervals(measured, prompts, lowest={"share": 0.0})
    assert found["share"] == pytest.approx(ends, abs=1e-4)
    assert found["mean"] == (outcome, outcome)


def test_a_difference_of_equal_outcomes_has_both_signs() -> None:
    ones = np.ones(48)
    width = bootstrap_intervals({"m": (0 * ones, ones)}, each(48), lowest={"m": 0.0})["m"][1]
    for value, sides in ((0, (-1, 1)), (1, (-1, 0)), (-1, (0, 1))):
        found = bootstrap_intervals({"m": (value * ones, ones)}, each(48), lowest={"m": -1.0})["m"]
        assert found == pytest.approx((value + sides[0] * width, value + sides[1] * width))


def labelled(rewards: np.ndarray, is_good: np.ndarray) -> PairValues:
    """Values of labelled records: the side that each lacks has 0 everywhere."""
    sides = {"chosen": is_good, "rejected": ~is_good}
    fields_of = {
        "reward": rewards,
        "logp": rewards - 50,
        "reference": np.full_like(rewards, -50),
        "tokens": 9,
    }
    columns = {
        f"{name}_{side}": each * has for name, each in fields_of.items() for side, has in sides.items()
    }
    columns["margin"] = columns["reward_chosen"] - columns["reward_rejected"]
    return PairValues.from_columns({name: column.astype(np.float32) for name, column in columns.items()})


def test_labelled_records_have_intervals_of_each_label() -> None:
    generator = np.random.default_rng(3)
    is_good = np.arange(300) % 3 == 0
    rewards = generator.integers(-6, 7, 300) / 4 + 0.5 * is_good
    plan = MetricPlan(LossConfig(kind=LossKind.kto), (), is_evaluation=True)
    means = {"rewards/margins": 0.5, "rewards/auc": 0.6}
    found = results(means, labelled(rewards, is_good), {}, each(300), plan, 0)
    row = found["all"]
    assert (row["eval_rewards/margins"], row["eval_rewards/auc"]) == (0.5, 0.6)
    for side, values in (("chosen", rewards[is_good]), ("rejected", rewards[~is_good])):
        low, high = row["intervals"][f"eval_rewards/{side}"]
        assert row[f"eval_rewards/{side}"] == pytest.approx(values.mean())
        assert low < values.mean() < high
    assert (row["eval_good"], row["eval_bad"], row["eval_pairs"]) == (100, 200, 300)
    assert not any("accurac" in name or "both_fall" in name for name in (*row, *row["intervals"]))
    assert evaluation_table(found)[0].split()[:3] == ["evaluation", "records", "AUC"]


def test_scores_of_labelled_records_are_those_of_their_side() -> None:
    columns = labelled_columns(labelled(np.array([0.5, -2.0]), np.array([True, False])))
    assert {name: column.tolist() for name, column in columns.items()} == {
        **{"reward": [0.5, -2.0], "logp": [-49.5, -52.0], "reference_logp": [-50.0, -50.0]},
        **{"tokens": [9.0, 9.0], "label": [True, False]},
    }
