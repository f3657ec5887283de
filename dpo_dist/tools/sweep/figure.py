"""The figure of a sweep: metrics over the swept value, with the spread over seeds."""

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean, stdev
from typing import Any

from dpo_dist.foundation.text import number
from dpo_dist.kit import LOSS_METRICS, MAIN, PREFIX, find_metric
from dpo_dist.tools.pages.blocks import Chart, Interval, Line

SEED = "trainer.seed"
_WIDE = 10.0  # numbers with a larger ratio are on a logarithmic axis


def figures(points: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return a chart for each main metric of the completed points; none without another key than the seed.

    Of the swept keys the one with most values is the horizontal axis, numbers first. Losses, rewards and
    margins have no chart if the losses of the points differ.
    """
    points = [point for point in points if point.get("metrics")]
    values = dict[str, dict[str, Any]]()
    for key in dict.fromkeys(chain.from_iterable(point["settings"] for point in points)):
        by_text = {_text(value): value for value in (point["settings"].get(key) for point in points)}
        if key != SEED and len(by_text) > 1:
            values[key] = by_text
    if not values:
        return []

    def rank(key: str) -> tuple[bool, int]:
        return all(map(_is_number, values[key].values())), len(values[key])

    over = max(values, key=rank)
    others = [key for key in values if key != over]
    losses_differ = any(key.partition(".")[0] == "loss" for key in values)
    charts = []
    for name in MAIN:
        for metric in (PREFIX + name, name):
            results = [point for point in points if metric in point["metrics"]]
            if results and not (losses_differ and name.startswith(LOSS_METRICS)):
                charts.append(_chart(results, metric, over, others))
    return charts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _chart(points: Sequence[Mapping[str, Any]], metric: str, over: str, others: Sequence[str]) -> Chart:
    """Return the means over seeds: a line for each combination of the other settings."""
    swept = {_text(point["settings"].get(over)): point["settings"].get(over) for point in points}
    has_numbers = all(map(_is_number, swept.values()))
    places: dict[str, float] = {text: at for at, text in enumerate(swept)}
    if has_numbers:
        places = dict(sorted(swept.items(), key=lambda item: item[1]))
    by_label = dict[str, dict[str, list[float]]]()
    for point in points:
        settings = point["settings"]
        label = ", ".join(f"{key.rpartition('.')[2]} {_text(settings.get(key))}" for key in others)
        results = by_label.setdefault(label, {}).setdefault(_text(settings.get(over)), [])
        results.append(point["metrics"][metric])
    lines = []
    known = find_metric(metric.removeprefix(PREFIX))
    for label, by_value in by_label.items():
        shown = [text for text in places if text in by_value]
        xs = [places[text] for text in shown]
        means = [fmean(by_value[text]) for text in shown]
        spreads = [_spread(by_value[text]) for text in shown]
        lines.append(Line(label or known.title, xs, means, "point", spreads))
    least = min(places.values())
    return Chart(
        f"evaluation {known.title}" if metric.startswith(PREFIX) else known.title,
        lines,
        known.unit,
        over,
        is_log=has_numbers and 0 < _WIDE * least <= max(places.values()),
        ticks={place: text for text, place in places.items()},
        note="Points: means over seeds; bars: standard deviations over seeds, where there are several.",
    )


def _spread(results: Sequence[float]) -> Interval:
    """Return the mean minus and plus the standard deviation; None for one result."""
    if len(results) < 2:
        return None
    return fmean(results) - stdev(results), fmean(results) + stdev(results)
