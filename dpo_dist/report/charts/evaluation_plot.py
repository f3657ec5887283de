"""An evaluation as one image: accuracy and margin with intervals, by label and by length, and calibration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dpo_dist import atomic
from dpo_dist.objective.metrics import BUCKETS
from dpo_dist.safe_stream import printable

Results = Mapping[str, Mapping[str, Any]]

_BLUE = "#2f6db3"
_ORANGE = "#e07b00"
_QUIET = "#6b7280"
_MOST_LABELS = 24
_ACCURACY = "eval_rewards/accuracies"
_MARGIN = "eval_rewards/margins"
_PANELS = ((_ACCURACY, "accuracy", 0.5), (_MARGIN, "reward margin", 0.0))
_OF_ONE_RESPONSE = (("eval_logps/chosen_per_token", "log-prob of a token, nats", None),)


def draw_evaluation(results: Results, path: Path, title: str) -> None:
    """Draw the results of an evaluation to the PNG file `path`.

    Args:
        results: of `evaluation.results`. A loss of one response has log-probs in place of accuracy, margin
            and calibration.
        path: written whole or not at all.
        title: one line above the panels.
    """
    whole = next(iter(results.values()))
    panels = _PANELS if _ACCURACY in whole else _OF_ONE_RESPONSE
    bins = whole.get("calibration", {}).get("bins", [])
    rows = [(printable(name), row, "") for name, row in list(results.items())[: _MOST_LABELS + 1]]
    rows += [(f"{bucket} tokens", whole, f"_by_length/{bucket}") for bucket in BUCKETS]
    rows = [each for each in rows if panels[0][0] + each[2] in each[1]]
    height = max(4.5, 1.6 + 0.34 * len(rows))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(15 if bins else 10, height), dpi=100, layout=layout)
    canvas = FigureCanvasAgg(figure)
    hidden = len(results) - 1 - _MOST_LABELS
    note = f"; {hidden} more labels are in evaluation.json" if hidden > 0 else ""
    figure.suptitle(
        f"{printable(title)}: {whole['eval_pairs']:,} pairs, 95 % intervals{note}", parse_math=False
    )
    columns = len(panels) + bool(bins)
    for position, (key, label, chance) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, columns, position)
        _draw_intervals(axes, rows, key, label, chance, names=position == 1)
    if bins:
        error = whole["calibration"]["expected_calibration_error"]
        _draw_calibration(figure.add_subplot(1, columns, columns), bins, error)
    with atomic.staged_file(path) as temporary:
        canvas.print_png(str(temporary))


def _draw_intervals(
    axes: Axes,
    rows: Sequence[tuple[str, Mapping[str, Any], str]],
    key: str,
    label: str,
    chance: float | None,
    *,
    names: bool,
) -> None:
    """Draw a point with its interval for each row, the first one on top."""
    if chance is not None:
        axes.axvline(chance, color=_QUIET, linewidth=1, linestyle=":")
    for position, (_, row, suffix) in enumerate(rows):
        value, ends = row[key + suffix], row["intervals"].get(key + suffix)
        color = _ORANGE if suffix else _BLUE
        if ends is not None:
            axes.plot(ends, (position, position), color=color, linewidth=2.5, alpha=0.5)
        axes.plot((value,), (position,), "o", color=color)
        axes.annotate(f"{value:.3f}", (value, position), (0, 6), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows] if names else [""] * len(rows))
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_calibration(axes: Axes, bins: Sequence[Mapping[str, Any]], error: float) -> None:
    """Draw the accuracy of each bin of confidence, with an area in proportion to its pairs."""
    axes.plot((0.5, 1), (0.5, 1), color=_QUIET, linewidth=1, linestyle=":")
    most = max(one["pairs"] for one in bins)
    areas = [20 + 280 * one["pairs"] / most for one in bins]
    x, y = ([one[name] for one in bins] for name in ("confidence", "accuracy"))
    axes.plot(x, y, color=_BLUE, linewidth=1)
    axes.scatter(x, y, areas, color=_BLUE, alpha=0.6)
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(min(0.48, *y) - 0.02, 1.02)
    axes.set_xlabel("confidence, sigmoid(abs(margin))")
    axes.set_ylabel("accuracy")
    axes.set_title(f"calibration error {error:.3f}; areas: pairs", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
