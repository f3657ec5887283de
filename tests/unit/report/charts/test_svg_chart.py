"""Charts of pages: complete without script, gaps where values are missing, long lines thinned, inert."""

import html
import json
import math
import re

import numpy as np
import pytest

from dpo_dist.insight.pages.render import html_page
from dpo_dist.insight.pages.svg import Line, chart, kept_points, number, smoothed, tick_texts, value_axis

HOSTILE = "</figure><script>alert(1)</script>\"'"


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
    both = [Line("a", [1, math.nan], "raw"), Line("a", [None, 1], "evaluation")]
    assert "a 1." in chart("x", both, [1, 2])
    over = chart("x", [Line("a", [1, None, 3, None, 5], "raw")], [1, 2, 3, 4, 5])
    assert paths(over, "raw")[0].count("M") == 1
    assert "Gaps" not in over
    assert data_of(gap)["lines"][0]["values"] == [1, "", 3, "", 5]
    assert data_of(over)["lines"][0]["values"] == [1, None, 3, None, 5]


def test_a_logarithmic_axis_counts_values_that_are_not_positive() -> None:
    figure = chart("x", [Line("a", [1e-3, 0, 1e3], "raw")], [1, 2, 3], log=True)
    assert "not positive: a 1." in figure
    assert data_of(figure)["yAxis"][2] is True


def test_without_a_point_there_is_no_chart() -> None:
    assert chart("x", [Line("a", [None, None], "raw")], [1, 2]) == ""
    assert chart("x", [], []) == ""
    assert "no value" in chart("x", [Line("a", [math.nan], "raw")], [1])


def test_long_lines_keep_their_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[777], values[99_000] = 50, -50
    kept = kept_points([values], 400)
    assert len(kept) <= 402
    assert {0, 777, 99_000, 99_999} <= set(kept.tolist())
    figure = chart("x", [Line("a", values.tolist(), "raw")], list(range(100_000)), list(range(100_000)))
    assert len(figure) < 20_000


def test_a_long_mean_without_values_keeps_its_shape_beside_few_evaluations() -> None:
    steps = list(range(10_000))
    wave: list[float | None] = [math.sin(step / 500) for step in steps]
    at_times = [0.5 if step % 1000 == 0 else None for step in steps]
    figure = chart("x", [Line("a", wave, "smooth"), Line("a", at_times, "evaluation")], steps)
    drawn = [value for value in data_of(figure)["lines"][0]["values"] if value is not None]
    assert len(drawn) > 150
    assert (min(drawn), max(drawn)) == pytest.approx((-1, 1), abs=1e-3)


def test_the_last_value_of_a_long_line_is_shown_wherever_it_is() -> None:
    steps = list(range(2000))
    evaluations: list[float | None] = [None] * 2000
    evaluations[1510:1513] = [9.0, 0.1, 0.5]
    unknown = [math.nan if step == 1511 else None for step in steps]
    lines = [Line("a", [*map(float, steps)], "raw"), Line("b", evaluations, "evaluation")]
    figure = chart("x", [*lines, Line("c", unknown, "evaluation")], steps)
    assert "b <b>0.5 at step 1,512</b>" in figure
    assert "c <b>no value at step 1,511</b>" in figure


def test_hours_are_a_second_axis_and_lines_may_have_their_own() -> None:
    figure = chart("x", [Line("a", [1, 2], "raw"), Line("b", [1, 2], "raw", hours=[5, 6])], [1, 2], [0.5, 1])
    assert 'class="curves timed"' in figure
    assert data_of(figure)["hourAxis"] == [0.5, 6]
    assert len(paths(figure, "raw")) == 4
    assert "timed" not in chart("x", [Line("a", [1, 2], "raw")], [1, 2])


def test_texts_are_inert() -> None:
    figure = chart(HOSTILE, [Line(HOSTILE, [1.0], "raw")], [1], unit=HOSTILE)
    assert "<script" not in figure
    assert figure.count("</figure>") == 1


def test_the_moving_mean_keeps_levels_and_reduces_noise() -> None:
    np.testing.assert_allclose(smoothed(np.full(500, 3.0)), np.full(500, 3.0))
    noise = np.random.default_rng(0).normal(size=500)
    assert smoothed(noise).std() < 0.3 * noise.std()
    few = np.array([1.0, 5.0, 2.0])
    np.testing.assert_array_equal(smoothed(few), few)


def test_the_moving_mean_has_no_value_in_a_gap_and_ignores_it_beside() -> None:
    values = np.full(500, 3.0)
    values[100] = math.nan
    mean = smoothed(values)
    assert math.isnan(mean[100])
    np.testing.assert_allclose(np.delete(mean, 100), 3.0)


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ([0, 0.25, 0.5], ["0", "0.25", "0.50"]),
        ([10_000, 12_500], ["10.0k", "12.5k"]),
        ([0, 1e-6], ["0", "1e-6"]),
        ([0, 1000], ["0", "1000"]),
    ],
)
def test_ticks_have_equally_many_digits(ticks: list[float], texts: list[str]) -> None:
    assert tick_texts(ticks) == texts


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.1235"), (12345.6, "12,346"), (1.5e-7, "1.5e-7"), (2e9, "2e9"), (0, "0"), (-3, "-3")],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [-1e30, 1e30], [1e-9, 2e-9]])
@pytest.mark.parametrize("is_log", [True, False])
def test_any_values_have_an_axis_with_ticks(values: list[float], is_log: bool) -> None:
    positive = [abs(value) or 1.0 for value in values] if is_log else values
    axis = value_axis(positive, 100, 0, is_log=is_log)
    assert 2 <= len(axis.ticks(5)) <= 10
    assert all(-1e-6 <= axis.place(tick) <= 100.001 for tick in axis.ticks(5))


def test_a_script_is_allowed_by_its_digest_only() -> None:
    assert "script" not in html_page("x", ["<p>y</p>"])
    page = html_page("x", ["<p>y</p>"], script="let a = 1;")
    assert "<script>let a = 1;</script>" in page
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'; ", page)
    assert "unsafe" not in page
