"""Training curves: one image from any rows; long runs are thinned."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_dist.report import plots


def training_row(step: int) -> dict[str, float]:
    noise = random.Random(step).gauss(0, 0.05)
    return {
        "step": step,
        "loss": 0.7 + noise,
        "rewards/accuracies": 0.5 + noise,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.1,
        "rewards/margins": 0.2,
        "logps/chosen": -200.0,
        "logps/rejected": -210.0,
        "grad_norm": 2.0 + noise,
        "learning_rate": 0.0,
        "tokens_per_second": 1e4,
    }


def evaluation_row(step: int) -> dict[str, float]:
    return {"step": step, "eval_loss": 0.6, "eval_rewards/chosen": 0.1, "eval_rewards/margins": 0.2}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="none"),
        pytest.param([training_row(1)], id="one"),
        pytest.param([training_row(step) for step in range(1, 60)] + [evaluation_row(59)], id="evaluated"),
        pytest.param([{"step": step, "loss": 1.0 / step} for step in range(1, 4)], id="loss only"),
        pytest.param([{"step": 5, "loss": math.nan, "grad_norm": math.inf}], id="not finite"),
        pytest.param([evaluation_row(0)], id="evaluation only"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_rows_give_one_image(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    path = tmp_path / "training_curves.png"
    plots.draw_curves(rows, path, r"a $run\_{$ <b>")
    assert imread(path).shape == (1000, 1600, 4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [1, 2, 1999, 2000, 2001, 100_000])
def test_long_runs_are_thinned_and_keep_their_last_point(length: int) -> None:
    kept = plots._thinned(length)
    assert kept[-1] == length - 1
    assert length / 60 <= len(kept) <= 2000 or len(kept) == length
    assert set(np.diff(kept)) <= {math.ceil(length / 2000)}


def test_the_moving_mean_keeps_levels_and_reduces_noise() -> None:
    constant = np.full(500, 3.0)
    np.testing.assert_allclose(plots._moving_mean(constant), constant)
    noise = np.random.default_rng(0).normal(size=500)
    assert plots._moving_mean(noise).std() < 0.3 * noise.std()
    few = np.array([1.0, 5.0, 2.0])
    np.testing.assert_array_equal(plots._moving_mean(few), few)


def test_values_that_are_not_finite_are_not_plotted() -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3}, {"step": 4, "loss": 4.0}]
    steps, values = plots._series(rows, "loss")
    assert steps.tolist() == [1, 4]
    assert values.tolist() == [1, 4]
