"""Numbers are written the same everywhere, and a message never says "1 pairs"."""

import math

import pytest

from dpo_dist.foundation.text import counted, duration, first_few, number, percent, size


def test_a_list_names_three_and_counts_the_rest() -> None:
    assert [first_few(list("abcd")[:count]) for count in (0, 1, 3, 4)] == [
        "",
        "a",
        "a, b, c",
        "a, b, c and 1 more",
    ]
    assert first_few(["a"] * 2003) == "a, a, a and 2,000 more"
    assert [first_few(["a"] * count, "other") for count in (4, 5)] == [
        "a, a, a and 1 other",
        "a, a, a and 2 others",
    ]


def test_one_is_singular() -> None:
    assert [counted(count, "pair") for count in (0, 1, 2000)] == ["0 pairs", "1 pair", "2,000 pairs"]
    assert [counted(count, "entry", "entries") for count in (1, 2)] == ["1 entry", "2 entries"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12_345_678, "12,345,678"),
        (0.0, "0"),
        (0.25, "0.25"),
        (-0.123456, "-0.1235"),
        (999.96, "1000"),
        (1234.6, "1,235"),
        (12_345_678.0, "1.23e7"),
        (1e-3, "0.001"),
        (5e-7, "5e-7"),
        (math.nan, "not finite"),
        (-math.inf, "not finite"),
    ],
)
def test_values_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_fewer_digits_are_never_an_exponent() -> None:
    assert [number(value, 3) for value in (0.98765, 12.345, 999.6)] == ["0.988", "12.3", "1000"]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1e-6, "under 0.01 %"),
        (0.00341, "0.34 %"),
        (0.052, "5.2 %"),
        (0.4149, "41 %"),
        (0.9967, "99.6 %"),
        (0.99999, "99.9 %"),
        (1.0, "100 %"),
        (1.22, "122 %"),
    ],
)
def test_only_all_is_100_percent_and_only_none_0_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.41, "0.41 s"),
        (9.97, "10 s"),
        (59.6, "1 min 00 s"),
        (303, "5 min 03 s"),
        (11_100, "3 h 05 min"),
        (187_200, "2 d 04 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [size(count) for count in (0, 64, 512, 0.7 * 2**30, 12.34 * 2**30, 3000 * 2**40)] == [
        "0 B",
        "64 B",
        "0.5 KiB",
        "0.7 GiB",
        "12.3 GiB",
        "3,000.0 TiB",
    ]
