"""Charts: what is drawn of metrics rows, long lines thinned, gaps where values are missing, images."""

import contextlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from dpo_dist.config.metrics import METRICS
from dpo_dist.tools.pages.blocks import Chart, Line
from dpo_dist.tools.pages.charts import Curves, charts_of_run, charts_of_runs, draw_curves, smoothed

pytestmark = pytest.mark.slow


def drawn(chart: Chart) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = json.loads(chart.data)["lines"]
    return lines


def rows(steps: int = 100, every: int = 20) -> list[dict[str, float]]:
    found = []
    for step in range(1, steps + 1):
        noise = random.Random(step).gauss(0, 0.05)
        found.append({"step": step, "loss": 0.7 + noise, "grad_norm": 2 + noise, "step_seconds": 36.0})
        if step % every == 0:
            found.append({"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7})
    return found


def test_every_metric_that_has_a_chart_is_drawn_in_it() -> None:
    names = [name for name, metric in METRICS.items() if metric.chart]
    charts = charts_of_run([{"step": step, **dict.fromkeys([*names, "custom/mine"], 0.5)} for step in (1, 2)])
    assert {METRICS[name].chart for name in names} | {"custom/mine"} == {chart.title for chart in charts}
    assert sum(len(chart.lines) for chart in charts) == len(names) + 1


def test_what_cannot_be_drawn_is_a_gap() -> None:
    values = [1, math.nan, 1e308, -math.inf, 5, 0]
    [line] = drawn(Chart("x", [Line("a", range(6), values)]))
    assert line["ys"] == [1, None, None, None, 5, 0]
    [line] = drawn(Chart("x", [Line("a", range(6), values)], has_log_values=True))
    assert line["ys"] == [1, None, None, None, 5, None], "0 has no logarithm"


def test_a_long_line_keeps_its_extremes_and_its_last_value() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[777], values[99_000] = 50, -50
    chart = Chart("x", [Line("a", range(100_000), values.tolist()), Line("b", [1510, 1512], [9.0, 0.5])])
    first, second = drawn(chart)
    assert len(chart.data) < 10_000
    assert {50, -50, float(f"{values[-1]:.6g}")} <= set(first["ys"])
    assert second["xs"] == [1510, 1512]


def test_the_moving_mean_has_no_gap_in_it() -> None:
    values = np.array([float(step % 2) for step in range(200)])
    values[100] = math.nan
    means = smoothed(values)
    assert np.isnan(means).nonzero()[0].tolist() == [100]
    assert np.nanmax(np.abs(means[20:180] - 0.5)) < 0.05
    assert smoothed(values[:2]).tolist() == [0, 1], "too few"


def test_a_comparison_has_one_line_of_steps_and_one_of_evaluations_for_each_run() -> None:
    runs = [Curves("a", "sigmoid", rows()), Curves("b", "ipo", rows(5))]
    charts = charts_of_runs(runs, "pair", ("loss",))
    assert [chart.title for chart in charts][:2] == ["Loss, sigmoid", "Loss, ipo"], "each kind has its own"
    roles = {chart.title: [(line.label, line.role) for line in chart.lines] for chart in charts}
    # Too few values for a mean are drawn themselves.
    assert roles["Gradient norm"] == [("a", "mean"), ("b", "line")]
    assert roles["Loss, sigmoid"] == [("a", "mean"), ("a", "evaluation")]


def test_spikes_of_the_loss_are_drawn() -> None:
    history = [row | {"loss_spikes": float((row["step"] > 4) + (row["step"] > 8))} for row in rows(40)]
    charts = {chart.title: chart.lines for chart in charts_of_run(history)}
    spikes = [line.xs for line in charts["Loss"] if line.role == "spike"]
    assert spikes == [[5, 9]]


@pytest.mark.parametrize("most", [1.0, 1e6])
def test_a_logarithmic_axis_of_the_image_has_some_ticks_with_plain_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: float
) -> None:
    figures = list[Figure]()
    monkeypatch.setattr(
        FigureCanvasAgg, "print_figure", lambda canvas, *_, **__: figures.append(canvas.figure)
    )
    steps = [
        {"step": step, "loss": 1.0, "grad_norm": norm} for step, norm in enumerate((0.6, 0.8, most), start=1)
    ]
    with contextlib.suppress(FileNotFoundError):  # nothing is written
        draw_curves(steps, tmp_path / "curves.png", "x")
    [figure] = figures
    [axes] = [each for each in figure.axes if each.get_title("left") == "Gradient norm"]
    texts = [label.get_text() for label in axes.get_yticklabels()]
    assert 2 <= len(list(filter(None, texts))) <= 10
    assert not [text for text in texts if "$" in text]


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
