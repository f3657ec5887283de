"""The charts of a run: panels of metrics on its page, and six of them as an image."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpo_dist.foundation import files
from dpo_dist.foundation.streams import printable
from dpo_dist.insight.pages.svg import COLORS, Axis, Line, Role, chart, smoothed

Rows = Sequence[Mapping[str, float]]

MOST_LABELS = len(COLORS)
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


IMAGE_PANELS = (
    Panel("Loss", (("loss", "loss"),)),
    Panel("Accuracy: chosen above rejected", (("accuracy", "rewards/accuracies"),)),
    Panel("Margin of rewards", (("margin", "rewards/margins"),)),
    Panel("Rewards", _sides("rewards/{}")),
    Panel("Gradient norm", (("norm before clipping", "grad_norm"),), is_log=True),
    Panel("Learning rate", (("learning rate", "learning_rate"),), is_smoothed=False),
)
"""Charts of the page that training_curves.png has too."""
PANELS = (
    *IMAGE_PANELS[:4],
    Panel("Log-prob per token", _sides("logps/{}_per_token"), "nats"),
    Panel("Distance from the reference", _sides("kl/{}"), "nats/token"),
    Panel("Accuracy by source", prefix="rewards/accuracies/"),
    Panel("Length of generated responses", (("length", "samples/length"),), "tokens"),
    Panel("Generated responses that end", (("share", "samples/finished"),)),
    *IMAGE_PANELS[4:],
    Panel(
        "Peak memory of the first GPU",
        (("tensors", "memory/peak_allocated_bytes"),),
        "GiB",
        is_smoothed=False,
        size=2**30,
    ),
)
"""All charts of the page, in their order."""


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
        seconds = itertools.accumulate(seconds_of_steps(self._rows))
        self.hours = [each / _SECONDS for each in seconds] if "step_seconds" in self._keys else None

    def labelled(self, panel: Panel) -> Panel:
        """Return the panel with the keys of its prefix as curves, at most `MOST_LABELS`."""
        if not panel.prefix:
            return panel
        names = {key.removeprefix(_EVALUATION) for key in self._keys}
        labels = sorted(name.removeprefix(panel.prefix) for name in names if name.startswith(panel.prefix))
        shown = labels[:MOST_LABELS]
        title = panel.title if len(shown) == len(labels) else f"{panel.title} ({len(shown)} of {len(labels)})"
        return replace(panel, title=title, curves=tuple((label, panel.prefix + label) for label in shown))

    def lines(self, panel: Panel) -> list[Line]:
        """Return the lines of a panel whose prefix is resolved.

        Each metric has its values at training steps, their moving mean and its values in evaluations. A panel
        with a prefix has means instead of values, because their many lines would hide each other.
        """
        lines = [line for label, key in panel.curves for line in self._lines(panel, label, key)]
        return [*lines, *self._spikes(panel)]

    def _spikes(self, panel: Panel) -> Iterator[Line]:
        """Yield the marks of the rows that count one more spike of the loss, on the chart of the loss."""
        if ("loss", "loss") in panel.curves and "loss_spikes" in self._keys:
            counts = itertools.accumulate(
                (row.get("loss_spikes", 0.0) for row in self._rows), max, initial=0.0
            )
            yield Line(
                "spike",
                [
                    row.get("loss") if row.get("loss_spikes", 0.0) > before else None
                    for row, before in zip(self._rows, counts, strict=False)
                ],
                "spike",
            )

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
                yield Line(label, points, role)

    def _values(self, panel: Panel, mark: str, key: str, absent: float | None) -> list[float | None]:
        """Return a value for each step: None without a row that has `mark`, `absent` if it lacks `key`."""
        if key not in self._keys:
            return []
        values = [row.get(key, absent) if mark in row else None for row in self._rows]
        return [None if each is None else each / panel.size for each in values]


def seconds_of_steps(rows: Rows) -> list[float]:
    """Return the seconds of the optimizer steps of each row; 0 for a row without them."""
    seconds, before = [], 0.0
    for row in rows:
        seconds.append(row["step_seconds"] * (row["step"] - before) if "step_seconds" in row else 0.0)
        before = row["step"] if "step_seconds" in row else before
    return seconds


def charts(rows: Rows) -> list[Markup]:
    """Return all charts of a run that have a value."""
    curves = Curves(rows)
    figures = (
        chart(panel.title, curves.lines(panel), curves.steps, curves.hours, panel.unit, log=panel.is_log)
        for panel in map(curves.labelled, PANELS)
    )
    return [figure for figure in figures if figure]


def _mean(values: Sequence[float | None]) -> list[float | None]:
    """Return the moving mean; empty if it equals the values because they are few."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    mean = smoothed(known)
    if np.array_equal(mean, known, equal_nan=True):
        return []
    means = iter(mean.tolist())
    return [None if value is None else next(means) for value in values]


_STYLES: Mapping[Role, Mapping[str, Any]] = {
    "raw": {"linewidth": 1.2},
    "smooth": {"linewidth": 2.0},
    "evaluation": {"linewidth": 0.9, "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "spike": {"linestyle": "", "marker": "v", "markersize": 7},
}


def draw_curves(rows: Rows, path: Path, title: str) -> None:
    """Draw metrics rows to the PNG file `path`, 1600 pixels wide, whole or not at all."""
    curves = Curves(rows)
    figure = Figure(figsize=(16, 8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(printable(title), parse_math=False)
    for axes, panel in zip(figure.subplots(2, 3).flat, IMAGE_PANELS, strict=True):
        axes.set_title(panel.title, loc="left")
        axes.grid(alpha=0.3)
        lines = curves.lines(panel)
        labels = list(dict.fromkeys(line.label for line in lines))
        with_mean = {line.label for line in lines if line.role == "smooth"}
        drawn: list[float] = []
        for line in lines:
            is_light = line.role == "raw" and line.label in with_mean
            points = [
                (step, value if math.isfinite(value) and (value > 0 or not panel.is_log) else math.nan)
                for step, value in zip(curves.steps, line.values, strict=True)
                if value is not None
            ]
            drawn += [value for _, value in points if not math.isnan(value)]
            name = f"{line.label} ({line.role})" if line.role == "evaluation" else line.label
            axes.plot(
                *zip(*points, strict=True),
                color=COLORS[labels.index(line.label)],
                alpha=0.35 if is_light else 1.0,
                label=None if is_light else name,
                **_STYLES[line.role],
            )
        axis = Axis.around(drawn, 0, 1, is_log=panel.is_log)
        axes.set_yscale("log" if panel.is_log else "linear")
        axes.set_ylim(axis.low, axis.high)
        if lines:
            axes.legend(frameon=False)
    with files.staged_file(path) as temporary:
        canvas.print_figure(temporary, format="png")
