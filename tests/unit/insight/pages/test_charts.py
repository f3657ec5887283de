"""Charts of pages and the image: gaps where values are missing, long lines thinned, texts inert."""

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

from dpo_dist.insight.pages.charts import PANELS, Panel, charts, draw_curves, panel_lines, rows_by_step
from dpo_dist.insight.pages.svg import (
    COLORS,
    Axis,
    Line,
    Point,
    chart,
    histogram,
    kept_points,
    scatter,
    smoothed,
)

HOSTILE = "</figure></svg><script>alert(1)</script>\"'\u202e"


def data_of(figure: str) -> dict[str, Any]:
    found = re.search(r'data-chart="([^"]*)"', figure)
    assert found is not None
    data: dict[str, Any] = json.loads(html.unescape(found[1]))
    return data


def paths(figure: str, role: str) -> list[str]:
    return re.findall(rf'<path class="{role} c\d" d="([^"]*)"', figure)


def test_raw_values_are_light_where_there_is_a_mean_and_evaluations_are_marks() -> None:
    raw, smooth = Line("train", [3, 2, 1], "raw"), Line("train", [3, 2, 1], "smooth")
    figure = chart("Loss", [raw, smooth, Line("eval", [None, 2, None], "evaluation")], [10, 20, 30])
    assert len(paths(figure, "raw light")) == len(paths(figure, "smooth")) == len(paths(figure, "mark")) == 1
    assert "light" not in chart("Loss", [raw], [10, 20, 30])
    assert "train <b>1 · mean 1</b>" in figure
    assert "eval <b>2 at step 20</b>" in figure


def test_a_value_that_is_not_finite_is_a_counted_gap_and_a_step_without_point_is_not() -> None:
    gap = chart("x", [Line("a", [1, math.nan, 3, math.inf, 5], "raw")], [1, 2, 3, 4, 5])
    assert paths(gap, "raw")[0].count("M") == 3
    assert "Gaps: values that are missing or not finite: a 2." in gap
    over = chart("x", [Line("a", [1, None, 3, None, 5], "raw")], [1, 2, 3, 4, 5])
    assert paths(over, "raw")[0].count("M") == 1
    assert "Gaps" not in over
    assert data_of(gap)["lines"] == [[1, "", 3, "", 5]]
    assert data_of(over)["lines"] == [[1, None, 3, None, 5]]
    positive = chart("x", [Line("a", [1e-3, 0, 1e3], "raw")], [1, 2, 3], log=True)
    assert "not positive: a 1." in positive
    assert chart("x", [Line("a", [None, None], "raw")], [1, 2]) == chart("x", [], []) == ""


def test_a_long_line_keeps_its_extremes_and_its_last_value() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[777], values[99_000] = 50, -50
    evaluations: list[float | None] = [None] * 100_000
    evaluations[1510:1513] = [9.0, 0.1, 0.5]
    lines = [Line("a", values.tolist(), "raw"), Line("b", evaluations, "evaluation")]
    figure = chart("x", lines, list(range(100_000)))
    assert len(figure) < 30_000
    assert {50, -50} <= set(data_of(figure)["lines"][0])
    assert "b <b>0.5 at step 1,512</b>" in figure


def test_peaks_of_every_line_are_kept_beside_missing_values() -> None:
    lines = [np.zeros(10_000), np.zeros(10_000)]
    lines[0][1234], lines[1][7654] = 9.0, -9.0
    lines[0][1200:1230] = lines[1][7600:7650] = np.nan
    kept = kept_points(lines, 100)
    assert {0, 1234, 7654, 9999} <= set(kept.tolist())
    assert len(kept) <= 100 + 2
    assert (np.diff(kept) > 0).all()


def test_texts_are_inert() -> None:
    for figure in (
        chart(HOSTILE, [Line(HOSTILE, [1.0], "raw")], [1], unit=HOSTILE),
        scatter([Point(HOSTILE, 1, 2, None, None)], HOSTILE, HOSTILE, (1.0, HOSTILE)),
        histogram([0, 1, 2], [1, 2], [0], HOSTILE),
    ):
        assert "<script" not in figure
        assert "\u202e" not in figure
        assert figure.count("</svg>") == 1


def test_a_scatter_has_numbered_points_with_intervals_and_a_line_for_the_base() -> None:
    points = [Point("a", 2.0, 0.6, [1.0, 4.0], [0.5, 0.7]), Point("b", 200.0, 0.4, [-1.0, 300.0], None)]
    figure = scatter(points, "KL", "score", (0.5, "base"))
    assert figure.count("<circle") == 2
    assert re.findall(r"<li class=\"c\d\"><b>(\d)</b> (\w)</li>", figure) == [("1", "a"), ("2", "b")]
    assert [path.count("M") for path in re.findall('class="error" d="([^"]*)"', figure)] == [2, 1]
    assert ">base</text>" in figure
    assert scatter([], "x", "y", None) == ""


def test_a_histogram_marks_a_limit_on_its_axis_only() -> None:
    figure = histogram([0.0, 10.0, 20.0, 30.0], [3, 0, 1], [0, 30, 3], "lengths", 25)
    assert figure.count("<rect") == 2
    assert "<title>0 to 10: 3</title>" in figure
    assert 'class="limit"' in figure
    assert 'class="limit"' not in histogram([0.0, 10.0], [3], [0], "lengths", 25)
    assert "NaN" not in histogram([-2.0, -1.0, 1.0], [3, 4], [-2, 1], "margins", 0.0)


def test_two_passes_of_a_mean_over_six_percent() -> None:
    impulse = np.zeros(100)
    impulse[50] = 1.0
    triangle = [max(0, 7 - abs(at - 50)) / 49 for at in range(100)]
    np.testing.assert_allclose(smoothed(impulse), triangle, atol=1e-12)
    values = np.full(100, 2.0)
    values[[0, 40, 99]] = np.nan, np.inf, -np.inf
    np.testing.assert_allclose(smoothed(values), values)


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [-1e30, 1e30], [1e-9, 2e-9]])
@pytest.mark.parametrize("is_log", [True, False])
def test_any_values_have_an_axis_with_ticks(values: list[float], is_log: bool) -> None:
    positive = [abs(value) or 1.0 for value in values] if is_log else values
    axis = Axis.around(positive, 100, 0, is_log=is_log)
    assert 2 <= len(axis.ticks(5)) <= 10
    assert all(-1e-6 <= axis.place(tick) <= 100.001 for tick in axis.ticks(5))


def rows(steps: int = 100, every: int = 20) -> list[dict[str, float]]:
    found = []
    for step in range(1, steps + 1):
        noise = random.Random(step).gauss(0, 0.05)
        found.append({"step": step, "loss": 0.7 + noise, "grad_norm": 2 + noise, "step_seconds": 36.0})
        if step % every == 0:
            found.append({"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7})
    return found


def lines_of(history: list[dict[str, float]], panel: Panel = PANELS[0]) -> list[Line]:
    return list(panel_lines(panel, rows_by_step(history)))


def test_a_metric_has_values_a_mean_and_evaluations() -> None:
    raw, smooth, evaluation = lines_of(rows())
    assert [line.role for line in (raw, smooth, evaluation)] == ["raw", "smooth", "evaluation"]
    assert raw.values[0] == rows()[0]["loss"]
    assert [step for step, value in enumerate(evaluation.values, 1) if value] == [20, 40, 60, 80, 100]
    assert [line.role for line in lines_of(rows(3))] == ["raw"]
    assert (len(charts(rows())), charts([])) == (3, [])


def test_an_evaluation_between_logged_steps_interrupts_no_line_and_a_missing_metric_is_a_gap() -> None:
    history = [{"step": 10, "loss": 1.0, "grad_norm": 2.0}, {"step": 15, "eval_loss": 1.0}]
    history.append({"step": 20, "loss": math.nan})
    raw, evaluation = lines_of(history)
    assert (raw.values[:2], evaluation.values) == ([1.0, None], [None, 1.0, None])
    (norm,) = lines_of(history, Panel("x", ("grad_norm",)))
    for line in (raw, norm):
        assert math.isnan(line.values[2] or 0)


def test_sources_have_a_chart_of_as_many_as_there_are_colours() -> None:
    sources = {f"eval_rewards/accuracies/{n}²": 0.5 for n in range(9)}
    panel = Panel("By source", ("rewards/accuracies",), by_source=True)
    labels = [line.label for line in lines_of([{"step": 1, "eval_loss": 1.0, **sources}], panel)]
    assert labels == [f"{n}²" for n in range(len(COLORS))]


def test_rows_that_count_one_more_spike_are_marked_on_the_loss() -> None:
    history = [row | {"loss_spikes": float((row["step"] > 4) + (row["step"] > 8))} for row in rows(10)]
    [spike] = [line for line in lines_of(history) if line.role == "spike"]
    assert [step for step, value in enumerate(spike.values, 1) if value] == [5, 9]
    assert '<path class="spike c1"' in charts(history)[0]


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([], id="none"),
        pytest.param([{"step": 1, "loss": 0.7, "rewards/chosen": 0.1, "learning_rate": 0.0}], id="one"),
        pytest.param(rows(), id="evaluated"),
        pytest.param([{"step": 5, "loss": math.nan, "grad_norm": math.inf}], id="not finite"),
        pytest.param([{"step": 0, "eval_loss": 0.6}], id="evaluation only"),
        pytest.param([{"step": step, "loss": 2.0**step} for step in range(1000)], id="diverged"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_rows_give_one_image(tmp_path: Path, history: list[dict[str, float]]) -> None:
    path = tmp_path / "training_curves.png"
    draw_curves(history, path, r"a $run\_{$ <b>")
    assert imread(path).shape == (800, 1600, 4)
    assert list(tmp_path.iterdir()) == [path]
