"""Training curves: one image from any rows."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_dist.insight.pages import charts
from dpo_dist.insight.pages.svg import LIGHT_COLORS


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
        pytest.param([training_row(step) for step in range(5000)], id="long"),
        pytest.param([{"step": step, "loss": 2.0**step} for step in range(1000)], id="diverged"),
        pytest.param(
            [{"step": 1, "loss": 1.0, **{f"rewards/accuracies/a${n}_{{": 0.5 for n in range(9)}}],
            id="sources with formulas",
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_rows_give_one_image(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    path = tmp_path / "training_curves.png"
    charts.draw_curves(rows, path, r"a $run\_{$ <b>")
    assert imread(path).shape[1:] == (1600, 4)
    assert list(tmp_path.iterdir()) == [path]


def colored(path: Path) -> set[str]:
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.unique(pixels, axis=0)}


def test_evaluations_are_drawn_in_the_colour_of_their_metric(tmp_path: Path) -> None:
    rows = [{"step": 1, "eval_loss": 1.0, "eval_rewards/chosen": 1.0, "eval_rewards/rejected": 2.0}]
    charts.draw_curves(rows, tmp_path / "curves.png", "x")
    found = colored(tmp_path / "curves.png")
    assert set(LIGHT_COLORS[:2]) <= found
    assert not set(LIGHT_COLORS[2:5]) & found


def test_a_value_that_is_not_finite_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes = []
    monkeypatch.setattr(charts.Axes, "annotate", lambda axes, text, *given, **named: notes.append(text))
    rows = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}, {"step": 3, "eval_loss": 1.0}]
    charts.draw_curves(rows, tmp_path / "curves.png", "x")
    assert notes == ["1 missing or not finite"]
