"""The figure of a sweep: means over seeds with their spread, over a value; lines for other settings."""

from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_dist.tools.pages.blocks import COLORS
from dpo_dist.tools.pages.charts import draw_charts
from dpo_dist.tools.sweep.figure import figures

pytestmark = pytest.mark.slow


ACCURACY = "eval_rewards/accuracies"


def point(accuracy: float, **settings: Any) -> dict[str, Any]:
    names = {"beta": "loss.beta", "kind": "loss.kind", "lr": "optim.lr", "seed": "trainer.seed"}
    metrics = {"eval_loss": 0.5, ACCURACY: accuracy, "eval_rewards/margins": 0.1}
    return {"settings": {names[key]: value for key, value in settings.items()}, "metrics": metrics}


BETA_AND_LR = [
    point(0.5 + beta / 10 + lr * 100 + seed / 50, beta=beta, lr=lr, seed=seed)
    for lr in (1e-3, 1e-4)
    for beta in (0.4, 0.1, 2.0)
    for seed in (0, 1, 2)
]


def test_a_point_is_the_mean_over_seeds_and_its_bar_their_deviation_and_nothing_elses() -> None:
    [chart] = figures(BETA_AND_LR)
    assert (chart.title, chart.over, chart.is_log) == ("evaluation accuracy", "loss.beta", True)
    assert chart.labels == ["lr 0.001", "lr 1e-4"]
    for lr, line in zip((1e-3, 1e-4), chart.lines, strict=True):
        assert line.xs == [0.1, 0.4, 2.0]
        for beta, mean, ends in zip(line.xs, line.ys, line.ends, strict=True):
            values = [0.5 + beta / 10 + lr * 100 + seed / 50 for seed in range(3)]
            assert mean == pytest.approx(sum(values) / 3)
            assert ends == pytest.approx((mean - stdev(values), mean + stdev(values)))


def test_what_is_no_number_has_a_place_of_its_own_and_what_has_one_seed_no_bar() -> None:
    [chart] = figures([point(0.6, kind="sigmoid"), point(0.8, kind="ipo")])
    assert (chart.ticks, chart.is_log) == ({0: "sigmoid", 1: "ipo"}, False)
    [line] = chart.lines
    assert (line.ys, line.ends) == ([0.6, 0.8], [None, None])


def test_other_settings_allow_losses_and_a_number_is_the_axis_of_a_mixed_sweep() -> None:
    by_lr = figures([point(0.6, lr=1e-4), point(0.7, lr=2e-4), point(0.7, lr=3e-4)])
    assert [chart.title for chart in by_lr] == [
        f"evaluation {name}" for name in ("loss", "accuracy", "margin")
    ]
    assert {chart.is_log for chart in by_lr} == {False}
    mixed = [point(0.6, kind=kind, beta=beta) for kind in ("sigmoid", "ipo", "hinge") for beta in (0.1, 1.0)]
    [chart] = figures(mixed)
    assert (chart.over, chart.is_log) == ("loss.beta", True)
    assert chart.labels == ["kind sigmoid", "kind ipo", "kind hinge"]


def test_points_without_results_and_sweeps_of_seeds_have_no_figure() -> None:
    assert figures([point(0.5, seed=seed) for seed in range(3)]) == []
    unfinished = {"settings": {"loss.beta": 0.3}, "outcome": "diverged"}
    [chart] = figures([point(0.5, beta=0.1), point(0.6, beta=0.2), unfinished])
    assert chart.ticks == {0.1: "0.1", 0.2: "0.2"}
    assert figures([]) == figures([unfinished]) == []


def test_both_files_have_every_line_and_texts_of_settings_are_inert(tmp_path: Path) -> None:
    hostile = "</text></svg><script>alert(1)</script>"
    svg, png = tmp_path / "sweep.svg", tmp_path / "sweep.png"
    draw_charts(
        [*figures(BETA_AND_LR), *figures([point(0.5, kind=hostile), point(0.6, kind="$x$")])],
        [svg, png],
        dpi=200,
    )
    text, pixels = svg.read_text(), imread(png)[:, :1000, :3]
    assert "<script" not in text
    for color in COLORS[:2]:
        assert f"stroke: {color}" in text
        wanted = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        across = np.flatnonzero((np.abs(pixels - wanted).max(-1) < 0.02).any(0))
        assert len(across) > pixels.shape[1] / 2, "a line through the image, not only in its legend"
