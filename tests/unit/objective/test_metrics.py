"""Metrics are exact means over the pairs of a global batch, however it was divided."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.config.loss_kinds import BcoDelta, LossConfig, LossKind, LossTermConfig
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import preference_loss
from dpo_dist.objective.metrics import (
    BATCH_REWARD,
    PAIR_METRICS,
    Counted,
    MetricSums,
    PairSources,
    metric_names,
    metric_sums,
)

CPU = torch.device("cpu")
CONFIG = LossConfig(beta=0.5)


def pairs(values: torch.Tensor) -> PairLogps:
    ones = torch.ones(len(values))
    return PairLogps(values[:, 0], values[:, 1], ones, ones)


def sums_of(policy: torch.Tensor, reference: torch.Tensor, weights: torch.Tensor) -> MetricSums:
    losses = preference_loss(pairs(policy), pairs(reference), CONFIG)
    return metric_sums(losses, pairs(policy), pairs(reference), CONFIG, weights)


def test_means_by_hand() -> None:
    policy = pairs(torch.tensor([[-1.0, -3.0], [-2.0, -2.0], [-4.0, -1.0], [-5.0, -9.0]]))
    reference = pairs(torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [-2.0, -2.0], [-5.0, -5.0]]))
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    means = metric_sums(losses, policy, reference, CONFIG, torch.ones(4)).means()
    assert means == pytest.approx(
        {
            "loss": 3.0,
            "rewards/chosen": 0.5 * (1 + 0 - 2 + 0) / 4,
            "rewards/rejected": 0.5 * (-1 + 0 + 1 - 4) / 4,
            # Two margins above zero, one tie that counts half, one below.
            "rewards/accuracies": 2.5 / 4,
            "rewards/margins": 0.5 * (2 + 0 - 3 + 4) / 4,
            "logps/chosen": -3.0,
            "logps/rejected": -15 / 4,
        }
    )
    assert tuple(means) == PAIR_METRICS


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_means_do_not_depend_on_parts_and_dummies(count: int, parts: int, dummies: int) -> None:
    generator = torch.Generator().manual_seed(count)
    policy, reference = -50 * torch.rand(2, count, 2, generator=generator)
    whole = sums_of(policy, reference, torch.ones(count))
    total = MetricSums.zeros(PAIR_METRICS, CPU)
    for part in torch.tensor_split(torch.arange(count), parts):
        total += sums_of(policy[part], reference[part], torch.ones(len(part)))
    for _ in range(dummies):
        total += sums_of(torch.full((1, 2), -7.0), torch.zeros(1, 2), torch.zeros(1))
    assert total.means() == pytest.approx(whole.means(), rel=1e-12, abs=1e-12)


def test_sums_are_exact_where_float32_would_lose_pairs() -> None:
    policy = pairs(torch.full((1, 2), -(2.0**24)))
    ones = replace(policy, chosen=torch.full((1,), -1.0))
    config = LossConfig(reference_free=True)
    total = MetricSums.zeros(PAIR_METRICS, CPU)
    for logps in (policy, *[ones] * 3):
        total += metric_sums(torch.zeros(1), logps, None, config, torch.ones(1))
    assert total.means()["logps/chosen"] == -(2.0**24 + 3) / 4


def test_metrics_have_no_graph() -> None:
    chosen = torch.tensor([-1.0], requires_grad=True)
    policy = PairLogps(chosen, chosen, torch.ones(1), torch.ones(1))
    losses = preference_loss(policy, None, LossConfig(reference_free=True))
    assert not metric_sums(losses, policy, None, CONFIG, torch.ones(1)).values.requires_grad


def test_the_reward_shift_of_bco_uses_its_own_rewards() -> None:
    """Reported rewards follow the first kind, which divides by the number of tokens."""
    tokens = torch.tensor([4.0])
    policy = PairLogps(torch.tensor([-8.0]), torch.tensor([-2.0]), tokens, tokens)
    terms = [LossTermConfig(LossKind.simpo), LossTermConfig(LossKind.bco_pair)]
    config = LossConfig(beta=0.5, terms=terms, reference_free=True, bco_delta=BcoDelta.running_mean)
    means = metric_sums(torch.zeros(1), policy, None, config, torch.ones(1)).means()
    assert means["rewards/chosen"] == 0.5 * -8 / 4
    assert means[BATCH_REWARD] == 0.5 * (-8 - 2) / 2


@given(st.integers(1, 12), st.integers(1, 5))
def test_metrics_by_source_do_not_depend_on_parts(count: int, parts: int) -> None:
    """A source without pairs has none, and a margin that is not finite stays in its source."""
    generator = torch.Generator().manual_seed(count)
    policy, reference = -50 * torch.rand(2, count, 2, generator=generator)
    policy[0, 0] = torch.nan
    sources = torch.randint(1, 4, (count,), generator=generator)
    labels = ("none", "one", "two", "three")
    names = metric_names(CONFIG, labels)
    total = MetricSums.zeros(names, CPU)
    for part in torch.tensor_split(torch.arange(count), parts):
        losses = preference_loss(pairs(policy[part]), pairs(reference[part]), CONFIG)
        of_part = PairSources(labels, sources[part])
        logps = pairs(policy[part]), pairs(reference[part])
        total += metric_sums(losses, *logps, CONFIG, torch.ones(len(part)), of_part)
    means = total.means()
    margins = 0.5 * ((policy - reference)[:, 0] - (policy - reference)[:, 1]).double()
    for number, label in enumerate(labels):
        ours = margins[sources == number]
        if not len(ours):
            assert not {f"rewards/margins/{label}", f"rewards/accuracies/{label}"} & set(means)
        else:
            wanted = float(ours.mean())
            assert means[f"rewards/margins/{label}"] == pytest.approx(wanted, rel=1e-5, nan_ok=True)
            assert means[f"rewards/accuracies/{label}"] == pytest.approx(float((ours > 0).double().mean()))


def test_a_metric_may_have_a_count_of_its_own() -> None:
    """Per token, and per pair that has a score; in two parts, with a dummy."""
    nan = float("nan")
    tokens, logps = torch.tensor([2.0, 1.0, 5.0, 4.0]), torch.tensor([-4.0, -1.0, -5.0, -99.0])
    gaps = torch.tensor([3.0, nan, 1.0, nan])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    total = MetricSums.zeros(("per_pair", "per_token", "gap", "unscored"), CPU)
    for part in (slice(0, 2), slice(2, 4)):
        total += MetricSums.of(
            {
                "per_pair": logps[part],
                "per_token": Counted(logps[part], tokens[part]),
                "gap": Counted(gaps[part], (~gaps[part].isnan()).float()),
                "unscored": Counted(gaps[part], torch.zeros(2)),
            },
            weights[part],
        )
    assert total.means() == pytest.approx({"per_pair": -10 / 3, "per_token": -10 / 8, "gap": 2.0})
