"""Charts of pages and the image: gaps where values are missing, long lines thinned."""

import html
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_dist.config.metrics import METRICS
from dpo_dist.tools.pages.charts import (
    PANELS,
    Axis,
    Curves,
    Line,
    chart,
    charts,
    charts_of_runs,
    draw_curves,
    histogram,
    panel_lines,
)


def data_of(figure: str) -> dict[str, Any]:
    found = re.search(r'data-chart="([^"]*)"', figure)
    assert found is not None
    data: dict[str, Any] = json.loads(html.unescape(found[1]))
    return data


def paths(figure: str, role: str) -> list[str]:
    return re.findall(rf'<path class="{role} c\d" d="([^"]*)"', figure)


def test_every_metric_that_has_a_chart_is_drawn_in_it() -> None:
    drawn = {name: metric.chart for name, metric in METRICS.items() if metric.chart}
    figures = "".join(charts([{"step": step, **dict.fromkeys(drawn, 0.5)} for step in (1, 2)], {}))
    assert [name for name, title in drawn.items() if html.escape(title) not in figures] == []


def test_a_value_that_is_not_finite_is_a_gap_and_a_step_without_point_is_not() -> None:
    gap = chart("x", [Line("a", "raw", [1, 2, 3, 4, 5], [1, math.nan, 3, math.inf, 5])])
    assert paths(gap, "raw")[0].count("M") == 3
    assert data_of(gap)["lines"] == [[[1, 2, 3, 4, 5], [1, None, 3, None, 5]]]
    over = chart("x", [Line("a", "raw", [1, 3, 5], [1, 3, 5])])
    assert paths(over, "raw")[0].count("M") == 1
    positive = chart("x", [Line("a", "raw", [1, 2, 3], [1e-3, 0, 1e3], log=True)], log=True)
    assert paths(positive, "raw")[0].count("M") == 2
    assert chart("x", [Line("a", "raw", [], [])]) == chart("x", []) == ""


def test_a_long_line_keeps_its_extremes_and_its_last_value() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[777], values[99_000] = 50, -50
    raw = Line("a", "raw", range(100_000), values.tolist())
    figure = chart("x", [raw, raw.smoothed(), Line("b", "evaluation", [1510, 1512], [9.0, 0.5])])
    assert len(figure) < 45_000
    assert {50, -50} <= set(data_of(figure)["lines"][0][1])
    assert "b <b>0.5 at step 1,512</b>" in figure


def test_the_moving_mean_has_no_gap_in_it() -> None:
    values = [float(step % 2) for step in range(200)]
    values[100] = math.nan
    means = Line("a", "raw", range(200), values).smoothed().values
    assert np.isnan(means).nonzero()[0].tolist() == [100]
    assert np.nanmax(np.abs(means[20:180] - 0.5)) < 0.05
    few = Line("a", "raw", [1, 2], [1, 2])
    assert few.smoothed() is few


@pytest.mark.parametrize("largest", [1e308, -1e308])
@pytest.mark.parametrize("name", ["grad_norm", "loss"])
def test_a_value_that_is_too_large_to_draw_is_a_gap(name: str, largest: float) -> None:
    values = [0.5, 1e30, largest, 0.4]
    rows = [{"step": step, "loss": 1.0} | {name: value} for step, value in enumerate(values, start=1)]
    drawn = "".join(charts(rows, {}))
    assert "1e+30" in drawn
    assert "e+308" not in drawn


@pytest.mark.parametrize("values", [[], [0.0], [-1e30, 1e30], [1e-9, 2e-9]])
@pytest.mark.parametrize("is_log", [True, False])
def test_any_values_have_an_axis_with_ticks(values: list[float], is_log: bool) -> None:
    positive = [abs(value) or 1.0 for value in values] if is_log else values
    axis = Axis.around(positive, 100, 0, is_log=is_log)
    assert 2 <= len(axis.ticks()) <= 10
    assert all(-1e-6 <= axis.place(tick) <= 100.001 for tick in axis.ticks())


def test_a_logarithmic_axis_within_a_decade_has_round_ticks() -> None:
    assert Axis.around([0.7099, 1.702], 0, 1, is_log=True).ticks() == [0.75, 1, 1.25, 1.5, 1.75]
    assert Axis.around([6.2, 8.8], 0, 1, is_log=True).ticks() == [6.5, 7.0, 7.5, 8.0, 8.5]


def test_a_few_different_lengths_are_no_solid_box() -> None:
    values = {"edges": [1, 2, 3], "counts": [4, 4], "smallest": 1, "largest": 2}
    picture = histogram({**values, "percentiles": dict.fromkeys((25, 50, 95), 1)}, "x")
    assert re.findall(r'width="(\S+)" height', picture) == ["24.0", "24.0"]


def rows(steps: int = 100, every: int = 20) -> list[dict[str, float]]:
    found = []
    for step in range(1, steps + 1):
        noise = random.Random(step).gauss(0, 0.05)
        found.append({"step": step, "loss": 0.7 + noise, "grad_norm": 2 + noise, "step_seconds": 36.0})
        if step % every == 0:
            found.append({"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7})
    return found


def test_a_comparison_has_one_line_of_steps_for_each_run() -> None:
    rows = [{"step": float(step), "loss": 1 / (1 + step)} for step in range(1, 101)]
    few = rows[:5]  # too few for a moving mean: their values themselves are drawn
    [figure] = charts_of_runs([Curves("a", "sigmoid", rows), Curves("b", "sigmoid", few)], "pair", ())
    assert len(paths(figure, "smooth")) == len(data_of(figure)["lines"]) == 2


def test_rows_that_count_one_more_spike_are_marked_on_the_loss() -> None:
    history = [row | {"loss_spikes": float((row["step"] > 4) + (row["step"] > 8))} for row in rows(10)]
    [spike] = [line for line in panel_lines(PANELS[0], history, {}) if line.role == "spike"]
    assert spike.steps.tolist() == [5, 9]
    assert '<path class="spike c1"' in charts(history, {})[0]


def test_the_noise_of_rounding_is_a_line_of_its_metrics() -> None:
    history = [row | {"rewards/margins": 0.01, "distance/chosen": 0.04} for row in rows(40)]
    shown = [figure for figure in charts(history, {"distance/chosen": 0.03}) if "noise of rounding" in figure]
    [figure] = shown
    assert "Distance from the reference" in figure
    assert "noise of rounding <b>0.03</b>" in figure


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([], id="none"),
        pytest.param(rows(), id="evaluated"),
        pytest.param([{"step": 1, "eval_loss": 0.6, "loss": math.nan, "grad_norm": math.inf}], id="diverged"),
    ],
)
@pytest.mark.filterwarnings("error", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_rows_give_one_image(tmp_path: Path, history: list[dict[str, float]]) -> None:
    path = tmp_path / "training_curves.png"
    draw_curves(history, path, r"a $run\_{$ <b>")
    assert imread(path).shape == (800, 1600, 4)
    assert list(tmp_path.iterdir()) == [path]
