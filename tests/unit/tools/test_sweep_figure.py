"""The figure of a sweep: means over seeds with their spread, over a value; lines for other settings."""

import re
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_dist.tools.pages.charts import COLORS
from dpo_dist.tools.sweep.figure import figure_charts, figures, write_figure

ACCURACY = "eval_rewards/accuracies"


def point(accuracy: float, **settings: Any) -> dict[str, Any]:
    names = {"beta": "loss.beta", "kind": "loss.kind", "lr": "optim.lr", "seed": "trainer.seed"}
    metrics = {"eval_loss": 0.5, ACCURACY: accuracy, "eval_rewards/margins": 0.1}
    return {"settings": {names[key]: value for key, value in settings.items()}, "metrics": metrics}


BETA_AND_LR = [
    point(0.5 + beta / 10 + lr * 100 + seed / 50, beta=beta, lr=lr, seed=seed)
    for lr in (1e-3, 1e-4)
    for beta in (0.4, 0.1, 0.2)
    for seed in (0, 1, 2)
]


def test_a_point_is_the_mean_over_seeds_and_its_bar_their_deviation_and_nothing_elses() -> None:
    [figure] = figures(BETA_AND_LR)
    assert (figure.metric, figure.over, figure.is_log) == (ACCURACY, "loss.beta", True), (
        "losses are not compared"
    )
    assert list(figure.series) == ["lr 0.001", "lr 1e-4"]
    for lr, means in zip((1e-3, 1e-4), figure.series.values(), strict=True):
        assert [each.value for each in means] == [0.1, 0.2, 0.4]
        for each in means:
            values = [0.5 + each.value / 10 + lr * 100 + seed / 50 for seed in range(3)]
            assert each.mean == pytest.approx(sum(values) / 3)
            assert (each.spread, each.seeds) == (pytest.approx(stdev(values)), 3)


def test_what_is_no_number_has_columns_from_zero_and_what_has_one_seed_no_bar() -> None:
    points = [point(0.6, kind="sigmoid"), point(0.8, kind="ipo")]
    [figure] = figures(points)
    assert (figure.has_numbers, figure.values, figure.is_log) == (False, ["sigmoid", "ipo"], False)
    [svg] = figure_charts([figure])
    assert svg.count("<rect ") == 2
    heights = [float(text) for text in re.findall(r'<rect [^>]* height="([\d.]+)"', svg)]
    assert heights[1] / heights[0] == pytest.approx(0.8 / 0.6, abs=0.01)
    assert "seeds" not in svg


def test_other_settings_allow_losses_and_a_number_is_the_axis_of_a_mixed_sweep() -> None:
    by_lr = figures([point(0.6, lr=1e-4), point(0.7, lr=2e-4), point(0.7, lr=3e-4)])
    assert [figure.metric for figure in by_lr] == ["eval_loss", ACCURACY, "eval_rewards/margins"]
    assert {figure.is_log for figure in by_lr} == {False}, "even steps"
    mixed = [point(0.6, kind=kind, beta=beta) for kind in ("sigmoid", "ipo", "hinge") for beta in (0.1, 1.0)]
    [figure] = figures(mixed)
    assert (figure.over, figure.is_log) == ("loss.beta", True)
    assert list(figure.series) == ["kind sigmoid", "kind ipo", "kind hinge"]


def test_points_without_results_and_sweeps_of_seeds_have_no_figure() -> None:
    assert figures([point(0.5, seed=seed) for seed in range(3)]) == []
    unfinished = {"settings": {"loss.beta": 0.3}, "outcome": "diverged"}
    [figure] = figures([point(0.5, beta=0.1), point(0.6, beta=0.2), unfinished])
    assert figure.values == [0.1, 0.2]
    assert figures([]) == figures([unfinished]) == []


def test_both_files_have_every_line_and_need_no_style_sheet(tmp_path: Path) -> None:
    shown, svg, png = figures(BETA_AND_LR), tmp_path / "sweep.svg", tmp_path / "sweep.png"
    write_figure(shown, svg, png)
    text, pixels = svg.read_text(), imread(png)[..., :3]
    for color in COLORS[:2]:
        assert f'color="{color}"' in text
        wanted = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        across = np.flatnonzero((np.abs(pixels - wanted).max(-1) < 0.02).any(0))
        assert len(across) > pixels.shape[1] / 2, "a line through the image, not only in its legend"
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert text.count("<circle ") == 6
    assert "loss.beta 0.1, lr 0.001: 0.63 ± 0.02, 3 seeds" in text


def test_texts_of_settings_are_inert(tmp_path: Path) -> None:
    hostile = "</text></svg><script>alert(1)</script>"
    write_figure(figures([point(0.5, kind=hostile), point(0.6, kind="$x$")]), tmp_path / "s", tmp_path / "p")
    assert "<script" not in (tmp_path / "s").read_text()
