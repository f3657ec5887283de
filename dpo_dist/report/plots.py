"""Training curves of a run as one image.

A colour has the same meaning in all panels: training, evaluation, chosen, rejected, margin. Bold lines are
moving means of the faint measured values; rings are evaluations.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from dpo_dist import atomic

FloatArray = NDArray[np.float64]
Rows = Sequence[Mapping[str, float]]

_TRAIN = "#2f6db3"
_EVAL = "#e07b00"
_CHOSEN = "#1a936f"
_REJECTED = "#c8385a"
_MARGIN = "#6a4c93"
_QUIET = "#6b7280"

_MOST_POINTS = 2000
_FEW_POINTS = 30
_SMOOTHED_SHARE = 0.06
_NOTE = "faint: logged steps    bold: moving mean, last value beside the name    rings: evaluations"


@dataclass(frozen=True)
class _Panel:
    title: str
    keys: tuple[str, ...]
    draw: Callable[[Axes, Rows], None]


def draw_curves(rows: Rows, path: Path, title: str) -> None:
    """Draw metrics rows to the PNG file `path`, 1600 x 1000 pixels.

    Args:
        rows: as in `log_history.json`. Lines and panels without any value are omitted.
        path: written whole or not at all.
        title: one line above the panels.
    """
    panels = [panel for panel in _PANELS if any(key in row for row in rows for key in panel.keys)]
    columns = math.ceil(math.sqrt(len(panels)))
    figure = Figure(figsize=(16, 10), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=17, fontweight="bold", parse_math=False)
    figure.supxlabel(_NOTE, x=0.01, ha="left", fontsize=10.5, color=_QUIET)
    steps = [row["step"] for row in rows]
    for position, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, position)
        panel.draw(axes, rows)
        _dress(axes, panel.title, min(steps), max(steps))
    with atomic.staged_file(path) as temporary:
        canvas.print_figure(temporary, format="png")


def _draw_loss(axes: Axes, rows: Rows) -> None:
    _draw_line(axes, rows, "loss", "train", _TRAIN)
    _draw_evaluations(axes, rows, "eval_loss", "eval", _EVAL)


def _draw_accuracy(axes: Axes, rows: Rows) -> None:
    axes.axhline(0.5, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _draw_line(axes, rows, "rewards/accuracies", "train", _TRAIN)
    _draw_evaluations(axes, rows, "eval_rewards/accuracies", "eval", _EVAL)
    axes.set_ylim(-0.02, 1.02)


def _draw_rewards(axes: Axes, rows: Rows) -> None:
    axes.axhline(0.0, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _draw_pair(axes, rows, "rewards")
    _draw_line(axes, rows, "rewards/margins", "margin", _MARGIN)
    _draw_evaluations(axes, rows, "eval_rewards/margins", None, _MARGIN)


def _draw_logps(axes: Axes, rows: Rows) -> None:
    _draw_pair(axes, rows, "logps")


def _draw_optimizer(axes: Axes, rows: Rows) -> None:
    _draw_line(axes, rows, "grad_norm", "gradient norm", _TRAIN)
    _draw_on_the_right(axes, rows, "learning_rate", "learning rate")


def _draw_on_the_right(axes: Axes, rows: Rows, key: str, label: str) -> None:
    steps, values = _series(rows, key)
    if len(steps) == 0:
        return
    right = axes.twinx()
    kept = _thinned(len(steps))
    dashed = (0, (5, 2))
    right.plot(
        steps[kept],
        values[kept],
        color=_QUIET,
        linewidth=1.6,
        linestyle=dashed,
        marker=_marker(len(steps)),
        markersize=4,
    )
    axes.plot([], [], color=_QUIET, linewidth=1.6, linestyle=dashed, label=f"{label} (right)")
    right.set_ylim(0, 1.15 * float(values.max()) or 1.0)
    right.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.2g}"))
    right.tick_params(colors=_QUIET, length=0)
    right.spines[:].set_visible(False)


def _draw_throughput(axes: Axes, rows: Rows) -> None:
    _draw_line(axes, rows, "tokens_per_second", "tokens/s", _TRAIN)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    _draw_on_the_right(axes, rows, "mfu", "share of the matmul peak")


_PANELS = (
    _Panel("Loss", ("loss", "eval_loss"), _draw_loss),
    _Panel("Reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies"), _draw_accuracy),
    _Panel("Rewards", ("rewards/chosen", "rewards/margins", "eval_rewards/chosen"), _draw_rewards),
    _Panel("Log-probs per response", ("logps/chosen", "eval_logps/chosen"), _draw_logps),
    _Panel("Gradient norm and learning rate", ("grad_norm", "learning_rate"), _draw_optimizer),
    _Panel("Throughput", ("tokens_per_second", "mfu"), _draw_throughput),
)


def _draw_pair(axes: Axes, rows: Rows, quantity: str) -> None:
    for side, color in (("chosen", _CHOSEN), ("rejected", _REJECTED)):
        _draw_line(axes, rows, f"{quantity}/{side}", side, color)
        _draw_evaluations(axes, rows, f"eval_{quantity}/{side}", None, color)


def _draw_line(axes: Axes, rows: Rows, key: str, label: str, color: str) -> None:
    steps, values = _series(rows, key)
    if len(steps) == 0:
        return
    smooth = _moving_mean(values)
    kept = _thinned(len(steps))
    axes.plot(steps[kept], values[kept], color=color, alpha=0.22, linewidth=1, zorder=2)
    axes.plot(
        steps[kept],
        smooth[kept],
        color=color,
        linewidth=2.2,
        marker=_marker(len(steps)),
        markersize=4,
        zorder=3,
        label=f"{label}  {_short(smooth[-1])}",
    )


def _draw_evaluations(axes: Axes, rows: Rows, key: str, label: str | None, color: str) -> None:
    steps, values = _series(rows, key)
    if len(steps) == 0:
        return
    kept = _thinned(len(steps))
    axes.plot(
        steps[kept],
        values[kept],
        color=color,
        linewidth=1 if label else 0,
        marker="o",
        markersize=6 if len(steps) <= _FEW_POINTS else 3,
        markerfacecolor="white",
        markeredgewidth=1.6,
        zorder=4,
        label=f"{label}  {_short(values[-1])}" if label else None,
    )


def _dress(axes: Axes, title: str, first_step: float, last_step: float) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=28)
    axes.legend(
        *axes.get_legend_handles_labels(),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        fontsize=10,
        frameon=False,
        borderaxespad=0.3,
        borderpad=0,
        handlelength=1.4,
        columnspacing=1.4,
    )
    axes.set_xlabel("optimizer step", color=_QUIET)
    margin = max(0.02 * (last_step - first_step), 0.5)
    axes.set_xlim(first_step - margin, last_step + margin)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors="#374151", length=0)


def _series(rows: Rows, key: str) -> tuple[FloatArray, FloatArray]:
    """Return steps and finite values of the rows that have `key`, both float64 [n]."""
    points = [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _moving_mean(values: FloatArray) -> FloatArray:
    """Return a moving mean: two passes of a centered mean over 6 % of the values; float64 [n]."""
    half = int(_SMOOTHED_SHARE * len(values) / 2)
    index = np.arange(len(values))
    first = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, len(values))
    for _ in range(2 if half else 0):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[end] - sums[first]) / (end - first)
    return values


def _thinned(length: int) -> NDArray[np.int64]:
    """Return evenly strided indices into `length` points, always including the last one."""
    stride = math.ceil(length / _MOST_POINTS)
    return np.arange(length - 1, -1, -stride, dtype=np.int64)[::-1]


def _marker(length: int) -> str:
    return "o" if length <= _FEW_POINTS else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
