"""Charts of pages: complete without script, gaps where values are missing, long lines thinned, inert."""

import html
import json
import math
import re

import numpy as np
import pytest

from dpo_dist.insight.pages.svg import (
    Axis,
    Line,
    Point,
    chart,
    evenly,
    histogram,
    kept_points,
    scatter,
    smoothed,
)

HOSTILE = "</figure></svg><script>alert(1)</script>\"'\u202e"


def data_of(figure: str) -> dict:
    return json.loads(html.unescape(re.search(r'data-chart="([^"]*)"', figure)[1]))


def paths(figure: str, role: str) -> list[str]:
    return re.findall(rf'<path class="{role} c\d" d="([^"]*)"', figure)


def test_raw_values_are_light_where_there_is_a_mean_and_evaluations_are_marks() -> None:
    figure = chart(
        "Loss",
        [
            Line("train", [3, 2, 1], "raw"),
            Line("train", [3, 2, 1], "smooth"),
            Line("eval", [None, 2, None], "evaluation"),
        ],
        [10, 20, 30],
    )
    assert len(paths(figure, "raw light")) == len(paths(figure, "smooth")) == len(paths(figure, "mark")) == 1
    assert "light" not in chart("Loss", [Line("train", [3, 2, 1], "raw")], [10, 20, 30])
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


def test_a_logarithmic_axis_counts_values_that_are_not_positive() -> None:
    figure = chart("x", [Line("a", [1e-3, 0, 1e3], "raw")], [1, 2, 3], log=True)
    assert "not positive: a 1." in figure
    assert data_of(figure)["yAxis"][2] is True


def test_without_a_point_there_is_no_chart() -> None:
    assert chart("x", [Line("a", [None, None], "raw")], [1, 2]) == chart("x", [], []) == ""
    assert scatter([], "x", "y", None) == ""
    assert "no value" in chart("x", [Line("a", [math.nan], "raw")], [1])


def test_a_long_line_keeps_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[777], values[99_000] = 50, -50
    figure = chart("x", [Line("a", values.tolist(), "raw")], list(range(100_000)))
    assert len(figure) < 20_000
    assert {50, -50} <= set(data_of(figure)["lines"][0])


def test_peaks_of_every_line_are_kept_beside_missing_values() -> None:
    lines = [np.zeros(10_000), np.zeros(10_000)]
    lines[0][1234], lines[1][7654] = 9.0, -9.0
    lines[0][1200:1230] = lines[1][7600:7650] = np.nan
    kept = kept_points(lines, 100)
    assert {0, 1234, 7654, 9999} <= set(kept.tolist())
    assert len(kept) <= 100 + 2
    assert (np.diff(kept) > 0).all()
    assert kept_points([np.arange(5.0)], 5).tolist() == [0, 1, 2, 3, 4]


def test_the_last_value_of_a_long_line_is_shown_wherever_it_is() -> None:
    steps = list(range(2000))
    evaluations: list[float | None] = [None] * 2000
    evaluations[1510:1513] = [9.0, 0.1, 0.5]
    unknown = [math.nan if step == 1511 else None for step in steps]
    lines = [Line("a", [*map(float, steps)], "raw"), Line("b", evaluations, "evaluation")]
    figure = chart("x", [*lines, Line("c", unknown, "evaluation")], steps)
    assert "b <b>0.5 at step 1,512</b>" in figure
    assert "c <b>no value at step 1,511</b>" in figure


def test_texts_are_inert() -> None:
    figures = (
        chart(HOSTILE, [Line(HOSTILE, [1.0], "raw")], [1], unit=HOSTILE),
        scatter([Point(HOSTILE, 1, 2, None, None)], HOSTILE, HOSTILE, (1.0, HOSTILE)),
        histogram([0, 1, 2], [1, 2], [0], HOSTILE),
    )
    for figure in figures:
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
    assert smoothed(np.array([1.0, 5.0, 2.0])).tolist() == [1.0, 5.0, 2.0]


@pytest.mark.parametrize(("most", "kept"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (99, list(range(10)))])
def test_rows_at_equal_distances(most: int, kept: list[int]) -> None:
    assert evenly(range(10), most) == kept
    assert evenly([], most) == []


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [-1e30, 1e30], [1e-9, 2e-9]])
@pytest.mark.parametrize("is_log", [True, False])
def test_any_values_have_an_axis_with_ticks(values: list[float], is_log: bool) -> None:
    positive = [abs(value) or 1.0 for value in values] if is_log else values
    axis = Axis.around(positive, 100, 0, is_log=is_log)
    assert 2 <= len(axis.ticks(5)) <= 10
    assert all(-1e-6 <= axis.place(tick) <= 100.001 for tick in axis.ticks(5))
