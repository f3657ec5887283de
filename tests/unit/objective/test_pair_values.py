"""Values of single pairs: rewards as the metrics define them, in the order of the dataset."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.metrics import MARGIN_PERCENTILES, PairValues, pair_values


def logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    lengths = torch.tensor([2.0] * len(chosen)), torch.tensor([4.0] * len(chosen))
    return PairLogps(torch.tensor(chosen).double(), torch.tensor(rejected).double(), *lengths)


def test_rewards_are_scaled_log_ratios() -> None:
    table = pair_values(logps([-1, -8], [-6, -2]), logps([-3, -4], [-4, -4]), LossConfig(beta=0.5))
    values = PairValues(*table.numpy())
    assert values.reward_chosen.tolist() == [1, -2]
    assert values.reward_rejected.tolist() == [-1, 1]
    assert values.margin.tolist() == [2, -3]
    assert values.logp_rejected.tolist() == [-6, -2]
    assert values.reference_chosen.tolist() == [-3, -4]
    assert (values.tokens_chosen.tolist(), values.tokens_rejected.tolist()) == ([2, 2], [4, 4])


def test_without_a_reference_its_log_probs_are_missing() -> None:
    values = PairValues(*pair_values(logps([-1], [-8]), None, LossConfig(LossKind.simpo, beta=2)).numpy())
    assert np.isnan(values.reference_chosen).all()
    assert np.isnan(values.reference_rejected).all()
    assert values.margin.tolist() == [-1 - -4]


def test_percentiles_of_margins() -> None:
    columns = len(fields(PairValues))
    margins = np.arange(101, dtype=np.float32)[::-1]
    values = PairValues.joined([(np.arange(101), np.tile(margins, (columns, 1)))], 101)
    assert values.margin_percentiles() == pytest.approx(
        dict(zip(MARGIN_PERCENTILES, (5, 25, 50, 75, 95), strict=True))
    )
