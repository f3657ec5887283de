"""Numbers are written the same everywhere, and a message never says "1 pairs"."""

import math

import pytest

from dpo_dist.foundation.text import counted, duration, first_few, number, percent, size

WRITTEN = {
    number: {
        **{
            0: "0",
            12_345_678: "12,345,678",
            0.25: "0.25",
            -0.123456: "-0.1235",
            999.96: "1000",
            1234.6: "1,235",
        },
        **{
            22_345_678.0: "2.23e7",
            1e-3: "0.001",
            5e-7: "5e-7",
            math.nan: "not finite",
            -math.inf: "not finite",
        },
    },
    percent: {
        **{0.0: "0 %", 1e-6: "under 0.01 %", 0.00341: "0.34 %", 0.052: "5.2 %", 0.4149: "41 %"},
        **{0.9967: "99.6 %", 0.99999: "99.9 %", 1.0: "100 %", 1.22: "122 %"},
    },
    duration: {
        **{0: "0 s", 0.41: "0.41 s", 9.97: "10 s", 59.6: "1 min 00 s", 303: "5 min 03 s"},
        **{11_100: "3 h 05 min", 187_200: "2 d 04 h"},
    },
    size: {0: "0 B", 64: "64 B", 512: "0.5 KiB", 12.34 * 2**30: "12.3 GiB", 3000 * 2**40: "3,000.0 TiB"},
}


@pytest.mark.parametrize(
    ("written", "value", "text"),
    [(written, value, text) for written, texts in WRITTEN.items() for value, text in texts.items()],
)
def test_a_value_is_written(written: object, value: float, text: str) -> None:
    assert written(value) == text  # type: ignore[operator]


def test_lists_and_counts() -> None:
    assert [first_few(list("abcd")[:count]) for count in (0, 3, 4)] == ["", "a, b, c", "a, b, c and 1 more"]
    assert first_few(["a"] * 5, "other") == "a, a, a and 2 others"
    assert [counted(count, "pair") for count in (0, 1, 2000)] == ["0 pairs", "1 pair", "2,000 pairs"]
    assert [counted(count, "entry", "entries") for count in (1, 2)] == ["1 entry", "2 entries"]
    assert [number(value, 3) for value in (0.98765, 999.6)] == ["0.988", "1000"], "never an exponent"
