"""Collapsed policies and spikes of the loss are found; healthy runs have neither."""

import numpy as np
import pytest

from dpo_dist.insight.verdict.facts import is_collapsed, spike_of_last

Rows = list[dict[str, float]]


def row(norm: float, chosen: float, rejected: float) -> dict[str, float]:
    logps = {"logps/chosen_per_token": chosen, "logps/rejected_per_token": rejected}
    return {"step": 1, "loss": 0.0, "grad_norm": norm, **logps}


@pytest.mark.parametrize(
    ("found", "is_one"),
    [
        (row(0.0, -6.066108226776123, -6.066108226776124), True),  # all tokens alike
        (row(0.0, -6.6e4, -6.7e4), True),
        ({"step": 1, "loss": 5.0, "grad_norm": 0.0, "logps/chosen_per_token": -80.0}, True),  # one-sided
        (row(0.0, -1.2, -2.3), False),  # a hinge loss that every pair satisfies
        (row(0.0, -6.31, -6.30), False),  # the same of a model with random weights
        (row(1e-9, -6.066, -6.066), False),
        (row(0.0, float("nan"), -1.0), False),
        ({"step": 1, "loss": 0.0, "grad_norm": 0.0}, False),
    ],
)
def test_a_policy_has_collapsed_without_gradient_and_without_usable_probabilities(
    found: dict[str, float], is_one: bool
) -> None:
    assert is_collapsed(found) is is_one


def healthy(seed: int, steps: int, pairs: int, kind: str = "sigmoid") -> list[float]:
    """Losses of a run that learns: margins of a growing spread, some mislabelled."""
    generator = np.random.default_rng(seed)
    grown = 1 - np.exp(-3 * np.arange(1, steps + 1) / steps)
    margins = generator.normal(2.0, 2.0, (pairs, steps)) * grown
    margins *= np.where(generator.random((pairs, steps)) < 0.1, -1, 1)
    losses = {
        "sigmoid": np.logaddexp(0, -margins),
        "hinge": np.maximum(0, 1 - margins),
        "ipo": (margins - 1) ** 2,
        "exponential": np.exp(-margins / 2),
    }[kind]
    return list(losses.mean(axis=0).tolist())


def spikes(losses: list[float]) -> list[tuple[int, float]]:
    """Steps and losses of the spikes; there is an evaluation among the rows."""
    rows: Rows = [{"step": 0, "eval_loss": 1.0}]
    rows += [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    found = (spike_of_last(rows[:at], row) for at, row in enumerate(rows))
    return [(spike.step, spike.loss) for spike in found if spike is not None]


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "exponential"])
@pytest.mark.parametrize(("steps", "pairs"), [(300, 8), (1000, 16), (300, 128)])
def test_of_ten_healthy_runs_none_has_a_spike(kind: str, steps: int, pairs: int) -> None:
    assert [seed for seed in range(10) if spikes(healthy(seed, steps, pairs, kind))] == []


def test_of_single_pairs_with_wrong_labels_few_are_spikes() -> None:
    assert len([seed for seed in range(40) if spikes(healthy(seed, 300, 1))]) <= 1


@pytest.mark.parametrize("pairs", [8, 16, 128])
def test_spikes_are_found_with_their_steps(pairs: int) -> None:
    for seed in range(10):
        losses = healthy(seed, 300, pairs)
        losses[100], losses[180], losses[200] = float("nan"), 12.0, 200.0
        assert spikes(losses) == [(181, 12.0), (201, 200.0)]


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([0.6931] * 60 + [0.6932], []),  # noise of rounding
        ([0.6931] * 60 + [1.3], []),  # less than twice
        ([5.0] + [1e-4] * 60 + [0.01], []),  # a hard pair where nearly all is learnt
        ([0.7] * 40 + [9.0], []),  # too early
        ([0.7] * 60 + [9.0, 9.5], [61]),
    ],
)
def test_small_and_early_jumps_are_no_spikes(losses: list[float], steps: list[int]) -> None:
    assert [step for step, _ in spikes(losses)] == steps
