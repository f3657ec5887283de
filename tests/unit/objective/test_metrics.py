"""Metrics are exact means over the pairs of a global batch, however it was divided."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import (
    BcoDelta,
    BcoPairOptions,
    LossConfig,
    LossKind,
    LossTermConfig,
    ReferenceFreeLossConfig,
)
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import BatchFacts, preference_loss
from dpo_dist.objective.metrics import (
    BATCH_REWARD,
    BUCKETS,
    CustomMetrics,
    MetricPlan,
    MetricSums,
    PairValues,
    ScoredPairs,
    custom_metrics,
    metric_sums,
    pair_values,
    wins,
)
from tests.support.own_metrics import OWN

CPU = torch.device("cpu")
CONFIG = LossConfig(beta=0.5)
PLAN = MetricPlan(CONFIG)


def pairs(values: torch.Tensor) -> PairLogps:
    ones = torch.ones(len(values))
    return PairLogps(values[:, 0], values[:, 1], ones, ones)


def means_of(
    losses: torch.Tensor, policy: PairLogps, reference: PairLogps | None, plan: MetricPlan = PLAN
) -> dict[str, float]:
    scored = ScoredPairs(policy, reference, torch.ones(len(losses)))
    return metric_sums(plan, losses, scored).means()


def test_means_by_hand() -> None:
    policy = pairs(torch.tensor([[-1.0, -3.0], [-2.0, -2.0], [-4.0, -1.0], [-5.8, -9.0]]))
    reference = pairs(torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [-2.0, -2.0], [-5.0, -5.0]]))
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    means = means_of(losses, policy, reference)
    assert means == pytest.approx(
        {
            "loss": 3.0,
            "rewards/chosen": 0.5 * (1 + 0 - 2 - 0.8) / 4,
            "rewards/rejected": 0.5 * (-1 + 0 + 1 - 4) / 4,
            # Two margins above zero, one tie that counts half, one below.
            "rewards/accuracies": 2.5 / 4,
            "rewards/margins": 0.5 * (2 + 0 - 3 + 3.2) / 4,
            # Only in the last pair is neither log-prob above or at the reference's.
            "rewards/both_fall": 0.25,
            "logps/chosen": -3.2,
            "logps/rejected": -15 / 4,
            "logps/chosen_per_token": -12.8 / 4,
            "logps/rejected_per_token": -15 / 4,
            "tokens/chosen": 1.0,
            "tokens/rejected": 1.0,
            "rewards/accuracies_by_length/1-63": 2.5 / 4,
            "rewards/margins_by_length/1-63": 0.5 * (2 + 0 - 3 + 3.2) / 4,
        }
    )


def test_a_reward_model_has_metrics_of_scores_and_none_of_log_probs() -> None:
    plan = MetricPlan(LossConfig(LossKind.reward), is_evaluation=True)
    tokens = torch.tensor([2.0, 100.0]), torch.tensor([63.0, 64.0])
    scores = PairLogps(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.5]), *tokens)
    means = means_of(torch.tensor([1.0, 2.0]), scores, None, plan)
    assert means == pytest.approx(
        {
            "loss": 1.5,
            "rewards/chosen": 1.0,
            "rewards/rejected": 0.75,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.25,
            "tokens/chosen": 51.0,
            "tokens/rejected": 63.5,
            "rewards/accuracies_by_length/1-63": 1.0,
            "rewards/margins_by_length/1-63": 2.0,
            "rewards/accuracies_by_length/64-127": 0.0,
            "rewards/margins_by_length/64-127": -1.5,
        }
    )
    values = pair_values(plan, scores, None)
    assert values["reward_chosen"].tolist() == [3.0, -1.0]
    assert values["logp_chosen"].isnan().all()


def test_metrics_per_token_have_the_counts_of_their_tokens() -> None:
    """Of every measured metric; a long response weighs as many tokens as it has."""
    tokens = torch.tensor([2.0, 100.0]), torch.tensor([63.0, 64.0])
    policy = PairLogps(torch.tensor([-4.0, -50.0]), torch.tensor([-63.0, -32.0]), *tokens)
    distance = PairLogps(torch.tensor([1.0, 4.1]), torch.tensor([0.0, 12.7]), *tokens)
    entropy = PairLogps(torch.tensor([2.0, 304.0]), torch.tensor([126.0, 128.0]), *tokens)
    plan = MetricPlan(CONFIG, is_evaluation=True)
    scored = ScoredPairs(policy, policy, torch.ones(2), distance=distance, entropy=entropy)
    sums = metric_sums(plan, torch.ones(2), scored)
    assert sums.names == tuple(plan.rows)
    means = sums.means()
    expected = {
        "logps/chosen_per_token": -54 / 102,
        "logps/rejected_per_token": -95 / 127,
        "distance/chosen": 5.1 / 102,
        "distance/rejected": 12.7 / 127,
        "entropy/chosen": 306 / 102,
        "entropy/rejected": 254 / 127,
        "tokens/chosen": 51.0,
        "tokens/rejected": 63.5,
        "rewards/both_fall": 0.0,
    }
    assert {name: means[name] for name in expected} == pytest.approx(expected)
    buckets = {name.rpartition("/")[2] for name in means if "_by_length/" in name}
    assert buckets == {"1-63", "64-127"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_margin_that_is_not_a_number_is_neither_right_nor_wrong(value: float) -> None:
    """An accuracy of 0 would accuse the labels. Other pairs keep theirs, in the metrics of other lengths."""
    tokens = torch.tensor([100.0, 10.0])
    policy = PairLogps(torch.tensor([value, -1.0]), torch.tensor([value, -2.0]), tokens, tokens)
    reference = PairLogps(torch.tensor([-2.0, -1.5]), torch.tensor([-2.0, -1.0]), tokens, tokens)
    means = means_of(torch.ones(2), policy, reference)
    for name in ("rewards/accuracies", "rewards/both_fall", "rewards/accuracies_by_length/64-127"):
        assert means[name] != means[name], name
    assert means["rewards/accuracies_by_length/1-63"] == 1.0


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8))
def test_every_pair_is_in_the_bucket_of_its_longer_response(lengths: list[int]) -> None:
    tokens = torch.tensor([float(length) for length in lengths])
    logps = PairLogps(tokens, -tokens, torch.ones_like(tokens), tokens)
    sums = metric_sums(PLAN, torch.zeros(len(lengths)), ScoredPairs(logps, None, torch.ones(len(lengths))))
    counts = sums.by_name(sums.values.tolist())[1]
    for bucket in BUCKETS:
        low, high = bucket.split("-")
        members = [int(low) <= length <= int(high or 10**9) for length in lengths]
        assert counts[f"rewards/margins_by_length/{bucket}"] == sum(members)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_means_do_not_depend_on_parts_and_dummies(
    count: int, parts: int, dummies: int, is_finite: bool
) -> None:
    """A source without pairs has none, and a margin that is not finite stays in its source."""
    generator = torch.Generator().manual_seed(count)
    policy, reference = -50 * torch.rand(2, count, 2, generator=generator)
    if not is_finite:
        policy[0, 0] = torch.nan
    sources = torch.randint(1, 4, (count,), generator=generator)
    labels = ("none", "one", "two", "three")
    plan = MetricPlan(CONFIG, labels)

    def sums_of(rows: torch.Tensor, weight: float = 1.0) -> MetricSums:
        logps, weights = (pairs(policy[rows]), pairs(reference[rows])), torch.full((len(rows),), weight)
        losses = preference_loss(*logps, CONFIG)
        return metric_sums(plan, losses, ScoredPairs(*logps, weights, sources=sources[rows]))

    rows = torch.arange(count)
    total = MetricSums.zeros(plan, CPU)
    for part in torch.tensor_split(rows, parts):
        total += sums_of(part)
    for _ in range(dummies):
        total += sums_of(rows[1:2], weight=0.0)
    means = total.means()
    assert means == pytest.approx(sums_of(rows).means(), rel=1e-12, abs=1e-12, nan_ok=True)
    margins = 0.5 * ((policy - reference)[:, 0] - (policy - reference)[:, 1]).double()
    for number, label in enumerate(labels):
        ours = margins[sources == number]
        if not len(ours):
            assert not {f"rewards/margins/{label}", f"rewards/accuracies/{label}"} & set(means)
        else:
            wanted = float(ours.mean())
            assert means[f"rewards/margins/{label}"] == pytest.approx(wanted, rel=1e-5, nan_ok=True)
            right = math.nan if math.isnan(wanted) else float((ours > 0).double().mean())
            assert means[f"rewards/accuracies/{label}"] == pytest.approx(right, nan_ok=True)


def test_the_reward_shift_of_bco_uses_its_own_rewards() -> None:
    """Reported rewards follow the first kind, which divides by the number of tokens."""
    tokens = torch.tensor([4.0])
    policy = PairLogps(torch.tensor([-8.0]), torch.tensor([-2.0]), tokens, tokens)
    shifted = LossTermConfig(LossKind.bco_pair, options=BcoPairOptions(BcoDelta.running_mean))
    config = ReferenceFreeLossConfig(beta=0.5, terms=[LossTermConfig(LossKind.simpo), shifted])
    means = means_of(torch.zeros(1), policy, None, MetricPlan(config))
    assert means["rewards/chosen"] == 0.5 * -8 / 4
    assert means[BATCH_REWARD] == 0.5 * (-8 - 2) / 2


def logps_of(chosen: list[float], rejected: list[float]) -> PairLogps:
    lengths = torch.tensor([2.0] * len(chosen)), torch.tensor([4.0] * len(chosen))
    return PairLogps(torch.tensor(chosen).double(), torch.tensor(rejected).double(), *lengths)


def values_of(plan: MetricPlan, policy: PairLogps, reference: PairLogps | None) -> PairValues:
    columns = pair_values(plan, policy, reference)
    return PairValues.from_columns({name: column.numpy() for name, column in columns.items()})


def test_values_of_pairs_by_hand_with_and_without_a_reference() -> None:
    policy = logps_of([-1, -8], [-6, -2])
    values = values_of(MetricPlan(LossConfig(beta=0.5)), policy, logps_of([-3, -4], [-4, -4]))
    assert values.reward_chosen.tolist() == [1, -2]
    assert values.reward_rejected.tolist() == [-1, 1]
    assert values.margin.tolist() == [2, -3]
    assert values.logp_rejected.tolist() == [-6, -2]
    assert values.reference_chosen.tolist() == [-3, -4]
    assert (values.tokens_chosen.tolist(), values.tokens_rejected.tolist()) == ([2, 2], [4, 4])
    free = values_of(MetricPlan(LossConfig(LossKind.simpo, beta=2)), policy, None)
    assert np.isnan([free.reference_chosen, free.reference_rejected]).all()
    assert free.margin.tolist() == [-1 + 3, -8 + 1]


@pytest.mark.parametrize(("weights", "mean"), [([3.0, 1.0], 1.25), ([0.0, 0.0], 0.0)])
def test_the_mean_of_a_term_has_the_weights_of_records_as_the_loss(weights: list[float], mean: float) -> None:
    config, values = LossConfig(terms=[LossTermConfig(LossKind.ipo)]), torch.tensor([1.0, 2.0])
    logps, facts = logps_of([-1, -2], [-3, -4]), BatchFacts(loss_weight=torch.tensor(weights))
    scored = ScoredPairs(logps, logps, torch.ones(2), facts)
    means = metric_sums(MetricPlan(config), values, scored, {LossKind.ipo: values}).means()
    assert means["loss/terms/ipo"] == means["loss"] == mean


def with_function(name: str, loss: str = "sigmoid") -> RunConfig:
    return load_run_config(
        ["model.path=m", f"loss={loss}", f"metrics.function=tests.support.own_metrics:{name}"]
    )


def test_metrics_of_a_function_are_means_over_pairs_without_dummies() -> None:
    config = with_function("of_pairs")
    plan = MetricPlan(config.loss, custom=custom_metrics(config.metrics.function, config.loss))
    assert plan.custom.names == ("custom/margin", "custom/likelier")
    policy, reference = logps_of([-1, -8, -2], [-6, -2, -9]), logps_of([-3, -4, 0], [-4, -4, 0])
    scored = ScoredPairs(policy, reference, torch.tensor([1.0, 1.0, 0.0]))
    sums = metric_sums(plan, torch.zeros(3), scored)
    assert sums.means()["custom/margin"] == pytest.approx(0.1 * (4 - 6) / 2)
    assert sums.means()["custom/margin"] == sums.means()["rewards/margins"]
    assert sums.means()["custom/likelier"] == 0.5
    values = values_of(plan, policy, reference)
    assert values.custom["custom/likelier"].tolist() == [1, 0, 1]


def test_a_function_of_means_is_accepted_for_labelled_records_too() -> None:
    config = with_function("of_pairs", "kto")
    names = custom_metrics(config.metrics.function, config.loss).names
    assert names == ("custom/margin", "custom/likelier")
    lacking = PairLogps(*torch.zeros(4, 1))
    assert lacking.mean_chosen == lacking.mean_rejected == 0


@pytest.mark.parametrize(
    ("name", "loss", "got"),
    [
        ("of_all", "sigmoid", "of the first pair alone"),
        ("mean", "sigmoid", "custom/margin: [] on cpu, of 3 pairs on cpu"),
        ("unnamed", "sigmoid", "Error: "),
        ("badly_named", "sigmoid", "custom/margin/math: "),
        ("infinite", "sigmoid", "-inf"),
        ("by_hand", "kto", "custom/likelihood: [-2.0, nan, "),
        ("none", "sigmoid", "nothing, of 3 pairs"),
        ("of_pairs", "simpo", "AttributeError: 'NoneType' object has no attribute 'margin'"),
    ],
)
def test_a_function_that_gives_no_metrics_is_refused(name: str, loss: str, got: str) -> None:
    config = with_function(name, loss)
    with pytest.raises(ConfigError, match=r"the metrics function cannot be used") as error:
        custom_metrics(config.metrics.function, config.loss)
    assert error.value.where == "metrics.function"
    assert got in error.value.got


def test_a_function_that_gives_other_names_later_is_refused() -> None:
    policy = logps_of([-1], [-6])
    with pytest.raises(ConfigError, match="the metrics function cannot be used"):
        CustomMetrics(OWN, ("custom/margin",)).compute(policy, policy, CONFIG)


def test_a_good_response_wins_over_those_below_it_and_half_over_its_equals() -> None:
    bad = torch.tensor([0.0, 1.0, 1.0])
    assert wins(torch.tensor([1.0, 2.0, -1.0]), bad) == (1 + 0.5 + 0.5) + 3 + 0
    assert wins(torch.tensor([2.0, math.nan]), bad).isnan()


def test_the_auc_of_a_source_is_of_its_own_responses() -> None:
    good, bad = np.array([3, 0, 5, 0, 1], np.float32), np.array([0, 2, 0, 9, 0], np.float32)
    plan, zeros = MetricPlan(LossConfig()), np.zeros(5, np.float32)
    columns = dict.fromkeys(values_of(plan, logps_of([0], [0]), logps_of([0], [0])).by_name, zeros)
    columns |= {"reward_chosen": good, "reward_rejected": bad, "tokens_chosen": good, "tokens_rejected": bad}
    # The second source has a bad response above all good ones, the third one no bad response.
    found = PairValues.from_columns(columns).auc_by_source(("a", "b", "c"), np.array([0, 0, 1, 1, 2]))
    assert found == {"rewards/auc/a": 1.0, "rewards/auc/b": 0.0}
