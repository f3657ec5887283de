"""Curves are smoothed and thinned without losing their shape."""

import numpy as np
import pytest

from dpo_dist.insight.pages.svg import evenly, kept_points, smoothed


def test_two_passes_of_a_mean_over_six_percent() -> None:
    impulse = np.zeros(100)
    impulse[50] = 1.0
    found = smoothed(impulse)
    triangle = [max(0, 7 - abs(at - 50)) / 49 for at in range(100)]
    np.testing.assert_allclose(found, triangle, atol=1e-12)


def test_values_that_are_not_finite_stay_and_are_in_no_mean() -> None:
    values = np.full(100, 2.0)
    values[[0, 40, 99]] = np.nan, np.inf, -np.inf
    np.testing.assert_allclose(smoothed(values), values)


def test_few_values_are_not_smoothed() -> None:
    assert smoothed(np.array([1.0, 5.0, 2.0])).tolist() == [1.0, 5.0, 2.0]


@pytest.mark.parametrize(("most", "kept"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (99, list(range(10)))])
def test_rows_at_equal_distances(most: int, kept: list[int]) -> None:
    assert evenly(range(10), most) == kept
    assert evenly([], most) == []


def test_peaks_of_every_line_are_kept_beside_missing_values() -> None:
    lines = [np.zeros(10_000), np.zeros(10_000)]
    lines[0][1234], lines[1][7654] = 9.0, -9.0
    lines[0][1200:1230] = lines[1][7600:7650] = np.nan
    kept = kept_points(lines, 100)
    assert {0, 1234, 7654, 9999} <= set(kept.tolist())
    assert len(kept) <= 100 + 2
    assert (np.diff(kept) > 0).all()


def test_a_short_curve_is_whole_and_no_line_has_no_points() -> None:
    assert kept_points([np.arange(5.0)], 5).tolist() == [0, 1, 2, 3, 4]
    assert kept_points([], 5).tolist() == []
