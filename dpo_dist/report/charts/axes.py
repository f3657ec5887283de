"""Axes of the charts of pages: places of values, and ticks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.ticker import LogLocator, MaxNLocator

from dpo_dist.number_text import number

_PADDING = 0.05
_MOST_DECADES = 6
_SHORT = 200.0  # a logarithmic axis has ticks within a decade below this ratio of its ends


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis: `low` is drawn at the coordinate `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the coordinate of a value; of a logarithmic axis it must be positive."""
        low, high, at = (
            (math.log10(self.low), math.log10(self.high), math.log10(value))
            if self.is_log
            else (self.low, self.high, value)
        )
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """Return at most about `most` round values within the axis; `whole`: integers only."""
        if self.is_log:
            is_short = self.high < _SHORT * self.low
            subs = (1.0, 2.0, 5.0) if is_short else (1.0,)
            found = LogLocator(subs=subs, numticks=_MOST_DECADES).tick_values(self.low, self.high)
        else:
            locator = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
            found = locator.tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        within = [float(tick) for tick in found if self.low - slack <= tick <= self.high + slack]
        return within if len(within) > 1 or not self.is_log else [self.low, self.high]


def value_axis(values: Iterable[float], start: float, end: float, *, is_log: bool) -> Axis:
    """Return the axis of finite `values`, with some room at both ends."""
    found = list(values)
    low, high = (min(found), max(found)) if found else (1.0, 10.0) if is_log else (0.0, 1.0)
    if is_log:
        room = (high / low) ** _PADDING if high > low else 2.0
        return Axis(low / room, high * room, start, end, is_log=True)
    room = _PADDING * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end)


def tick_texts(ticks: list[float], *, is_log: bool = False) -> list[str]:
    """Return the ticks as text, those of a linear axis with equally many digits: 0.25 and 0.50, 10k, 2e-6."""
    largest = max(map(abs, ticks), default=0.0)
    if is_log or (largest and not 1e-3 <= largest < 1e7):
        return [number(tick) for tick in ticks]
    scale, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    for digits in range(6):
        texts = [f"{tick / scale:.{digits}f}" for tick in ticks]
        if all(
            math.isclose(float(text), tick / scale, abs_tol=1e-6 * largest / scale)
            for text, tick in zip(texts, ticks, strict=True)
        ):
            break
    return [f"{text}{suffix}" if float(text) else "0" for text in texts]
