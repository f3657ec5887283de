"""The charts of a run: panels of metrics, and their values by step from the metrics rows."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpo_dist.report.charts.script import AXIS_SWITCH, LIGHT_COLORS
from dpo_dist.report.charts.smoothing import smoothed
from dpo_dist.report.charts.svg_chart import Line, Role, chart

Rows = Sequence[Mapping[str, float]]

MOST_LABELS = len(LIGHT_COLORS)
"""Curves of a panel; a panel by source with more sources has the first ones, and its title says so."""

_SECONDS = 3600
_EVALUATION = "eval_"


@dataclass(frozen=True)
class Panel:
    """A chart of one or more metrics.

    Attributes:
        title: above the chart.
        curves: label and key of each metric; an evaluation has `eval_` before the key.
        unit: of the values.
        is_log: whether the axis is logarithmic.
        prefix: start of further keys; the rest of such a key is its label.
        is_smoothed: whether training values have a moving mean.
        size: of the unit in that of the metric.
    """

    title: str
    curves: tuple[tuple[str, str], ...] = ()
    unit: str = ""
    is_log: bool = False
    prefix: str = ""
    is_smoothed: bool = True
    size: float = 1.0


def _sides(key: str) -> tuple[tuple[str, str], ...]:
    return tuple((side, key.format(side)) for side in ("chosen", "rejected"))


PANELS = (
    Panel("Loss", (("loss", "loss"),)),
    Panel("Accuracy: chosen above rejected", (("accuracy", "rewards/accuracies"),)),
    Panel("Margin of rewards", (("margin", "rewards/margins"),)),
    Panel("Rewards", _sides("rewards/{}")),
    Panel("Both responses fall", (("share of pairs", "rewards/both_fall"),)),
    Panel("Log-prob per token", _sides("logps/{}_per_token"), "nats"),
    Panel("Log-prob of a response", _sides("logps/{}"), "nats"),
    Panel("Distance from the reference", _sides("kl/{}"), "nats/token"),
    Panel("Entropy", _sides("entropy/{}"), "nats/token"),
    Panel("Accuracy by source", prefix="rewards/accuracies/"),
    Panel("Accuracy by length", prefix="rewards/accuracies_by_length/", unit="tokens"),
    Panel("Length of generated responses", (("length", "samples/length"),), "tokens"),
    Panel("Generated responses that end", (("share", "samples/finished"),)),
    Panel("Gradient norm", (("norm before clipping", "grad_norm"),), is_log=True),
    Panel("Learning rate", (("learning rate", "learning_rate"),), is_smoothed=False),
    Panel("Throughput", (("tokens per second", "tokens_per_second"),)),
    Panel(
        "Peak memory of the first GPU",
        (("tensors", "memory/peak_allocated_bytes"),),
        "GiB",
        is_smoothed=False,
        size=2**30,
    ),
    Panel(
        "Model FLOPs utilization", (("of the measured peak", "mfu"), ("of the datasheet", "mfu/datasheet"))
    ),
)
"""All charts of a run, in their order."""


class Curves:
    """Metrics rows by step.

    Attributes:
        steps: all steps with a row, increasing.
        hours: hours of training steps up to each of them, without evaluations and starts; None if the rows do
            not have the seconds of a step.
    """

    def __init__(self, rows: Rows):
        merged: dict[float, dict[str, float]] = {}
        for row in sorted(rows, key=lambda row: row["step"]):
            merged.setdefault(row["step"], {}).update(row)
        self.steps = list(merged)
        self._rows = list(merged.values())
        self._keys = set().union(*self._rows)
        self.hours = self._hours()

    def labelled(self, panel: Panel) -> Panel:
        """Return the panel with the keys of its prefix as curves, at most `MOST_LABELS`."""
        if not panel.prefix:
            return panel
        found = {
            key.removeprefix(start)
            for key in self._keys
            for start in (panel.prefix, _EVALUATION + panel.prefix)
            if key.startswith(start)
        }
        labels = sorted(found, key=_natural)
        shown = labels[:MOST_LABELS]
        title = panel.title if len(shown) == len(labels) else f"{panel.title} ({len(shown)} of {len(labels)})"
        return replace(panel, title=title, curves=tuple((label, panel.prefix + label) for label in shown))

    def lines(self, panel: Panel, name: str = "") -> list[Line]:
        """Return the lines of a panel whose prefix is resolved.

        Each metric has its values at training steps, their moving mean and its values in evaluations. A panel
        with a prefix has means instead of values, because their many lines would hide each other.

        Args:
            panel: of `labelled`.
            name: of the run, which is the label instead of the metric's own.
        """
        lines = [line for label, key in panel.curves for line in self._lines(panel, name or label, key)]
        return lines if name else [*lines, *self._spikes(panel)]

    def _spikes(self, panel: Panel) -> Iterator[Line]:
        """Yield the marks of the rows that count one more spike of the loss, on the chart of the loss."""
        if ("loss", "loss") not in panel.curves or "loss_spikes" not in self._keys:
            return
        counts = itertools.accumulate((row.get("loss_spikes", 0.0) for row in self._rows), max, initial=0.0)
        marked = [
            row.get("loss") if row.get("loss_spikes", 0.0) > before else None
            for row, before in zip(self._rows, counts, strict=False)
        ]
        if any(value is not None for value in marked):
            yield Line("spike", marked, "spike", self.hours)

    def over(self, steps: Sequence[float], panel: Panel, name: str) -> list[Line]:
        """Return the `lines` of a panel with values for each of `steps`, among which are all own ones."""
        places = {step: place for place, step in enumerate(self.steps)}
        own = [places.get(step) for step in steps]
        hours = None if self.hours is None else [math.nan if at is None else self.hours[at] for at in own]
        return [
            Line(line.label, [None if at is None else line.values[at] for at in own], line.role, hours)
            for line in self.lines(panel, name)
        ]

    def _lines(self, panel: Panel, label: str, key: str) -> Iterator[Line]:
        values = self._values(panel, "loss", key, absent=math.nan)
        mean = _mean(values) if panel.is_smoothed else []
        found: tuple[tuple[list[float | None], Role], ...] = (
            ([] if panel.prefix and mean else values, "raw"),
            (mean, "smooth"),
            (self._values(panel, f"{_EVALUATION}loss", _EVALUATION + key, absent=None), "evaluation"),
        )
        for points, role in found:
            if any(value is not None for value in points):
                yield Line(label, points, role, self.hours)

    def _values(self, panel: Panel, mark: str, key: str, absent: float | None) -> list[float | None]:
        """Return a value for each step: None without a row that has `mark`, `absent` if it lacks `key`."""
        if key not in self._keys:
            return []
        values = [row.get(key, absent) if mark in row else None for row in self._rows]
        return values if panel.size == 1 else [None if each is None else each / panel.size for each in values]

    def _hours(self) -> list[float] | None:
        """Return the sums of the seconds of the steps; None if no row has them."""
        if not any("step_seconds" in row for row in self._rows):
            return None
        return [seconds / _SECONDS for seconds in itertools.accumulate(seconds_of_steps(self._rows))]


def seconds_of_steps(rows: Rows) -> list[float]:
    """Return the seconds of the optimizer steps of each row; 0 for a row without them."""
    seconds, before = [], 0.0
    for row in rows:
        seconds.append(row["step_seconds"] * (row["step"] - before) if "step_seconds" in row else 0.0)
        before = row["step"] if "step_seconds" in row else before
    return seconds


def charts(rows: Rows) -> str:
    """Return all charts of a run with the switch of their horizontal axis, as HTML; empty without a value."""
    curves = Curves(rows)
    panels = map(curves.labelled, PANELS)
    figures = [
        chart(panel.title, curves.lines(panel), curves.steps, curves.hours, panel.unit, log=panel.is_log)
        for panel in panels
    ]
    return chart_grid(figures)


def comparison_charts(runs: Mapping[str, Rows]) -> str:
    """Return the charts of several runs, a colour each, as HTML; a chart has one metric.

    Args:
        runs: metrics rows by the name of the run.
    """
    found = {name: Curves(rows) for name, rows in runs.items()}
    steps = sorted({step for curves in found.values() for step in curves.steps})
    figures = []
    for panel in PANELS:
        labelled = [curves.labelled(panel).curves for curves in found.values()]
        for label, key in dict.fromkeys(itertools.chain(*labelled)):
            single = replace(panel, curves=((label, key),), prefix="")
            lines = [line for name, curves in found.items() for line in curves.over(steps, single, name)]
            title = panel.title if len(panel.curves) == 1 else f"{panel.title}: {label}"
            figures.append(chart(title, lines, steps, None, panel.unit, log=panel.is_log))
    return chart_grid(figures)


def chart_grid(figures: Sequence[str]) -> str:
    """Return charts side by side, with the switch of their horizontal axis; empty without a chart."""
    return f'{AXIS_SWITCH}<div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def _mean(values: Sequence[float | None]) -> list[float | None]:
    """Return the moving mean; empty if it equals the values because they are few."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    mean = smoothed(known)
    if np.array_equal(mean, known, equal_nan=True):
        return []
    means = iter(mean.tolist())
    return [None if value is None else next(means) for value in values]


def _natural(label: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers in labels by value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", label)]
