"""Draw docs/figures and write the tables of docs/performance.md; measures nothing.

Input is docs/performance.json, which `curves` writes. In the page, the text between `<!-- PART -->` and
`<!-- end of PART -->` is replaced.
"""

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.options import Benchmark, Json
from benchmarks.setting import ROOT
from benchmarks.tables import (
    ABLATIONS,
    OURS,
    TRL,
    Spread,
    cpu_seconds_per_pair,
    pairs_per_second,
    peak_mib,
    table,
    times_faster,
    variant_points,
)

# The look of the package's own curves (dpo_dist/insight/pages/charts.py).
_BLUE = "#2f6db3"
_ORANGE = "#e07b00"
_GREEN = "#1a936f"
_QUIET = "#6b7280"
_GRID = "#e5e7eb"
_DASHED = (0, (4, 2))
_LEGEND_PAD = 44  # room for two lines between title and panel
_WORDS = {
    "shared_prefix": ("the prompt's share of prompt and response", "linear"),
    "response_tokens": ("mean tokens of a response", "log"),
    "model_size": ("parameters of the model", "log"),
}
_STEADY = {"svg.hashsalt": "dpo_dist", "svg.fonttype": "path"}


def run(options: Namespace) -> Json:
    """Draw all parts."""
    parts: dict[str, Json] = json.loads(options.measurements.read_text())
    page = options.page.read_text()
    for name, part in parts.items():
        image = options.figures / f"{name}.svg"
        _save(_draw(name, part), image)
        page = _with_block(page, name, _block(name, part, image.relative_to(options.page.parent)))
    options.page.write_text(page)
    return {"parts": list(parts)}


def _own_options(parser: ArgumentParser) -> None:
    docs = ROOT / "docs"
    parser.add_argument("--measurements", type=Path, default=docs / "performance.json")
    parser.add_argument("--page", type=Path, default=docs / "performance.md")
    parser.add_argument("--figures", type=Path, default=docs / "figures", help="a folder below the page's")


def _draw(name: str, part: Json) -> Figure:
    with mpl.rc_context({"font.size": 10.5}):
        match name:
            case "memory":
                return _draw_memory(part)
            case "ablation":
                return _draw_ablation(part)
            case "encode":
                return _draw_encode(part)
            case _:
                return _draw_beside_trl(name, part)


def _draw_beside_trl(name: str, part: Json) -> Figure:
    """Draw pairs/s of both, and TRL's CPU seconds over ours."""
    words, scale = _WORDS[name]
    figure, (speed, times) = _panels(
        ("Pairs per second", "TRL's CPU seconds / dpo_dist's"), title_pad=_LEGEND_PAD
    )
    ours, trl = variant_points(part, OURS), variant_points(part, TRL)
    for label, color, points in (("dpo_dist", _BLUE, ours), ("TRL at its best", _ORANGE, trl)):
        xs = _x_values(points)
        for with_reference in (False, True):
            values = [pairs_per_second(point, with_reference=with_reference) for point in points]
            _draw_line(speed, xs, values, f"{label}{_suffix(with_reference)}", color, with_reference)
    for with_reference in (False, True):
        pairs = zip(ours, trl, strict=True)
        values = [times_faster(a, b, with_reference=with_reference) for a, b in pairs]
        label = "training and reference" if with_reference else "training"
        _draw_line(times, _x_values(ours), values, label, _GREEN, with_reference)
    times.axhline(1.0, color=_QUIET, linewidth=1, linestyle=_DASHED, zorder=1)
    speed.set_yscale("log" if scale == "log" else "linear")
    for axes in (speed, times):
        _dress(axes, words)
        _mark_x_values(axes, ours, scale)
    if scale == "linear":
        speed.set_ylim(bottom=0)
    else:
        speed.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        speed.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        speed.yaxis.set_minor_locator(ticker.NullLocator())
    times.set_ylim(bottom=0)
    return figure


def _draw_memory(part: Json) -> Figure:
    figure, (memory, speed) = _panels(("Peak memory, GiB", "Pairs per second"))
    points = part["points"]
    peaks = [Spread.of([peak_mib(point) / 1024]) for point in points]
    _draw_line(memory, _x_values(points), peaks, "memory", _BLUE)
    speeds = [pairs_per_second(point, with_reference=False) for point in points]
    _draw_line(speed, _x_values(points), speeds, "speed", _BLUE)
    for axes in (memory, speed):
        _dress(axes, "trainer.micro_batch_tokens")
        _mark_x_values(axes, points, "log")
        axes.set_ylim(bottom=0)
    return figure


def _draw_ablation(part: Json) -> Figure:
    figure, (cost, memory) = _panels(("CPU seconds per pair", "Peak memory, GiB"), (1.5, 1.0))
    points = part["points"]
    costs = [cpu_seconds_per_pair(point, with_reference=False) for point in points]
    bars = (
        (cost, costs, [f"{value.median / costs[0].median:.2f}x" for value in costs]),
        (memory, [Spread.of([peak_mib(point) / 1024]) for point in points], None),
    )
    xs = list(range(len(points)))
    for axes, values, labels in bars:
        medians = [value.median for value in values]
        colors = [_BLUE, *[_ORANGE] * (len(points) - 1)]
        drawn = axes.barh(xs, medians, color=colors, height=0.62, zorder=2)
        axes.bar_label(drawn, labels or [f"{value:.2f}" for value in medians], padding=5, color="#374151")
        axes.set_xlim(0, 1.18 * max(medians))
        axes.set_yticks(xs, [])
        axes.invert_yaxis()
        _dress(axes, "")
        axes.grid(visible=False, axis="y")
    cost.set_yticks(xs, [_without(point["variant"]) for point in points])
    return figure


def _draw_encode(part: Json) -> Figure:
    figure, panels = _panels(("Records per second", "Tokens per second"))
    points = part["points"]
    xs = [point["processes"] for point in points]
    for axes, what in zip(panels, ("records", "tokens"), strict=True):
        speeds = [Spread.of([point[f"{what}_per_second"]]) for point in points]
        _draw_line(axes, xs, speeds, what, _BLUE)
        _dress(axes, "processes")
        axes.set_xticks(xs)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    return figure


def _without(variant: str) -> str:
    return "dpo_dist" if variant == OURS else f"without {ABLATIONS[variant]}"


def _suffix(with_reference: bool) -> str:
    return ", with its reference" if with_reference else ""


def _panels(
    titles: tuple[str, str], widths: tuple[float, float] = (1.0, 1.0), title_pad: float = 10
) -> tuple[Figure, tuple[Axes, Axes]]:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
    figure = Figure(figsize=(11, 4.4), layout=layout)
    left, right = figure.subplots(1, 2, width_ratios=widths)
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", pad=title_pad)
    return figure, (left, right)


def _x_values(points: Sequence[Json]) -> list[float]:
    """Return x coordinates: the number of a point, or its position among named points."""
    return [i if isinstance(point["x"], str) else float(point["x"]) for i, point in enumerate(points)]


def _mark_x_values(axes: Axes, points: Sequence[Json], scale: str) -> None:
    names = [point["x"].upper() if isinstance(point["x"], str) else f"{point['x']:g}" for point in points]
    if not isinstance(points[0]["x"], str):
        axes.set_xscale(scale)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xticks(_x_values(points), names)


def _draw_line(
    axes: Axes,
    xs: Sequence[float],
    values: Sequence[Spread],
    label: str,
    color: str,
    dashed: bool = False,
) -> None:
    medians = [value.median for value in values]
    axes.errorbar(
        xs,
        medians,
        yerr=[
            [value.median - value.least for value in values],
            [value.most - value.median for value in values],
        ],
        color=color,
        linewidth=2.2 if not dashed else 1.6,
        linestyle=_DASHED if dashed else "solid",
        marker="o",
        markersize=5,
        markerfacecolor="white" if dashed else color,
        capsize=3,
        elinewidth=1,
        zorder=3,
        label=label,
    )


def _dress(axes: Axes, words: str) -> None:
    axes.set_xlabel(words, color=_QUIET)
    if len(axes.containers) > 1:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(axes.containers) // 2,
            fontsize=9.5,
            frameon=False,
            borderpad=0,
            columnspacing=1.4,
        )
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors="#374151", length=0)


def _save(figure: Figure, path: Path) -> None:
    """Write an SVG whose bytes depend on the drawing only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STEADY):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None, "Creator": None})


def _block(name: str, part: Json, image: Path) -> str:
    """Return figure, table, and the circumstances of the measurement."""
    versions = ", ".join(f"{package} {part['packages'][package]}" for package in ("torch", "trl"))
    rounds = len(part["points"][0].get("rounds", [None]))
    circumstances = (
        f"{part['date']}, {part['machine']}, {part['threads']} threads, {rounds} round{'s' * (rounds > 1)}, "
        f"{versions}, commit {part['git_commit'][:10]}: `{part['command']}`"
    )
    return f"![{name.replace('_', ' ')}]({image})\n\n{table(name, part)}\n\n{circumstances}"


def _with_block(page: str, name: str, block: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    replaced, found = re.subn(
        rf"{begin}\n.*?{end}", lambda _: f"{begin}\n\n{block}\n\n{end}", page, flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(f"the page lacks the markers of {name}: lines `{begin}` and `{end}`")
    return replaced


BENCHMARK = Benchmark(run, own=_own_options)
