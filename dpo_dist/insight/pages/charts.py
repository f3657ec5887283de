"""The charts of a run: panels of metrics on its page, and six of them as an image."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpo_dist.config.metrics import METRICS, PREFIX
from dpo_dist.foundation import files
from dpo_dist.foundation.streams import printable
from dpo_dist.insight.pages.svg import COLORS, Axis, Line, Role, chart, smoothed

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Panel:
    """A chart of one or more metrics; `by_source` of its metric by source, only means, as they are many."""

    title: str
    keys: tuple[str, ...]
    is_log: bool = False
    is_smoothed: bool = True
    by_source: bool = False


def _sides(key: str) -> tuple[str, str]:
    return key.format("chosen"), key.format("rejected")


IMAGE_PANELS = (
    Panel("Loss", ("loss",)),
    Panel("Accuracy: chosen above rejected", ("rewards/accuracies",)),
    Panel("Margin of rewards", ("rewards/margins",)),
    Panel("Rewards", _sides("rewards/{}")),
    Panel("Gradient norm", ("grad_norm",), is_log=True),
    Panel("Learning rate", ("learning_rate",), is_smoothed=False),
)
"""Charts of the page that training_curves.png has too."""
PANELS = (
    *IMAGE_PANELS[:4],
    Panel("Log-prob per token", _sides("logps/{}_per_token")),
    Panel("Distance from the reference", _sides("kl/{}")),
    Panel("Accuracy by source", ("rewards/accuracies",), by_source=True),
    Panel("Length of generated responses", ("samples/length",)),
    Panel("Generated responses that end", ("samples/finished",)),
    *IMAGE_PANELS[4:],
)
"""All charts of the page, in their order."""


def charts(rows: Rows) -> list[Markup]:
    """Return all charts of a run that have a value."""
    merged = rows_by_step(rows)
    steps = [row["step"] for row in merged]
    figures = (
        chart(
            panel.title,
            list(panel_lines(panel, merged)),
            steps,
            METRICS[panel.keys[0]].unit,
            log=panel.is_log,
        )
        for panel in PANELS
    )
    return [figure for figure in figures if figure]


def rows_by_step(rows: Rows) -> list[Mapping[str, float]]:
    """Return one row for each step, with its evaluation."""
    merged: dict[float, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        merged.setdefault(row["step"], {}).update(row)
    return list(merged.values())


def panel_lines(panel: Panel, rows: Rows) -> Iterator[Line]:
    """Yield the lines of a panel: of each metric its values, their moving mean and those of evaluations.

    A panel by source has the first sources only, as many as there are colours.
    """
    known = set().union(*rows)
    labels = {key: key.split("/")[-1].removesuffix("_per_token") for key in panel.keys}
    if len(panel.keys) == 1:
        labels = {panel.keys[0]: METRICS[panel.keys[0]].title}
    if panel.by_source:
        prefix = f"{panel.keys[0]}/"
        names = sorted({name for key in known if (name := key.removeprefix(PREFIX)).startswith(prefix)})
        labels = {name: name.removeprefix(prefix) for name in names[: len(COLORS)]}
    for key, label in labels.items():
        values = _values(rows, "loss", key, math.nan) if key in known else []
        mean = _mean(values) if panel.is_smoothed else []
        found: tuple[tuple[list[float | None], Role], ...] = (
            ([] if panel.by_source and mean else values, "raw"),
            (mean, "smooth"),
            (_values(rows, f"{PREFIX}loss", PREFIX + key, None), "evaluation"),
        )
        yield from (Line(label, each, role) for each, role in found if any(v is not None for v in each))
    if panel.keys == ("loss",) and "loss_spikes" in known:
        counts = itertools.accumulate((row.get("loss_spikes", 0.0) for row in rows), max, initial=0.0)
        spikes = [
            row.get("loss") if row.get("loss_spikes", 0.0) > before else None
            for row, before in zip(rows, counts, strict=False)
        ]
        yield Line("spike", spikes, "spike")


def _values(rows: Rows, mark: str, key: str, absent: float | None) -> list[float | None]:
    """Return a value for each row: None of one without `mark`, `absent` of one that has it without `key`."""
    return [row.get(key, absent) if mark in row else None for row in rows]


def _mean(values: Sequence[float | None]) -> list[float | None]:
    """Return the moving mean; empty if it equals the values because they are few."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    mean = smoothed(known)
    if np.array_equal(mean, known, equal_nan=True):
        return []
    means = iter(mean.tolist())
    return [None if value is None else next(means) for value in values]


_STYLES: Mapping[Role, Mapping[str, Any]] = {
    "raw": {"linewidth": 1.2, "alpha": 0.5},
    "smooth": {"linewidth": 2.0},
    "evaluation": {"linewidth": 0.9, "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "spike": {"linestyle": "", "marker": "v", "markersize": 7},
}


def draw_curves(rows: Rows, path: Path, title: str) -> None:
    """Draw metrics rows to the PNG file `path`, 1600 pixels wide, whole or not at all."""
    merged = rows_by_step(rows)
    figure = Figure(figsize=(16, 8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(printable(title), parse_math=False)
    margins = {"left": 0.05, "right": 0.99, "bottom": 0.05, "top": 0.9, "hspace": 0.25, "wspace": 0.2}
    for axes, panel in zip(figure.subplots(2, 3, gridspec_kw=margins).flat, IMAGE_PANELS, strict=True):
        axes.set_title(panel.title, loc="left")
        axes.grid(alpha=0.3)
        colors: dict[str, str] = {}
        drawn: list[float] = []
        for line in panel_lines(panel, merged):
            points = [
                (row["step"], value if math.isfinite(value) and (value > 0 or not panel.is_log) else math.nan)
                for row, value in zip(merged, line.values, strict=True)
                if value is not None
            ]
            drawn += [value for _, value in points if not math.isnan(value)]
            color = colors.setdefault(line.label, COLORS[len(colors)])
            name = None if line.role == "smooth" else line.label
            name = f"{line.label} (evaluation)" if line.role == "evaluation" else name
            axes.plot(*zip(*points, strict=True), color=color, label=name, **_STYLES[line.role])
        axis = Axis.around(drawn, 0, 1, is_log=panel.is_log)
        if panel.is_log:
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.set_ylim(axis.low, axis.high)
        if colors:
            axes.legend(frameon=False)
    with files.staged_file(path) as temporary:
        canvas.print_figure(temporary, format="png")
