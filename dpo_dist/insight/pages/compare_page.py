"""Picture of KL against quality, as inline SVG: intervals as bars, the frontier as a line, labels apart."""

import heapq
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation import files
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import counted, number
from dpo_dist.insight.pages.compare import (
    TABLES_STYLE,
    Estimate,
    Model,
    Results,
    differences_table,
    finite,
    headline,
    models_table,
    read_results,
    response_of,
    style_table,
    warnings,
    win_matrix,
)
from dpo_dist.insight.pages.render import Row, html_bytes, html_page, inert_html, json_rows, section, text_of
from dpo_dist.insight.pages.side_by_side import (
    SIDE_STYLE,
    Response,
    cut,
    end_notes,
    prompt_title,
    side_by_side,
)
from dpo_dist.insight.pages.svg import Axis, tick_texts, value_axis

_WIDTH, _HEIGHT = 720.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 704.0, 14.0, 346.0
_TICKS = 6
_POINT = 5.0
_LINE, _CHARACTER = 15.0, 7.0
_LABEL_CHARACTERS = 28
_AWAY = (10, 22, 36, 52, 70, 92)

Place = tuple[float, float]
"""A point of the picture."""

PARETO_STYLE = """
.pareto { width: 100%; min-width: 600px; max-width: 860px; height: auto; display: block; }
.pareto text { font-size: 12px; fill: currentColor; stroke: Canvas; stroke-width: 3px; paint-order: stroke; }
.pareto .ticks { fill: var(--quiet); }
.pareto .grid { stroke: var(--line); }
.pareto .interval { stroke: var(--quiet); stroke-width: 1.5; }
.pareto .frontier { stroke: var(--best); stroke-width: 2; fill: none; stroke-dasharray: 6 4; }
.pareto .leader { stroke: var(--quiet); stroke-width: 0.75; }
.pareto circle { stroke: var(--best); stroke-width: 2; fill: var(--best); }
.pareto circle.behind { fill: Canvas; stroke: var(--quiet); }
"""


class Box(NamedTuple):
    """A rectangle, or a line, that labels keep free."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Return whether both have a common area."""
        return (
            self.left <= other.right
            and other.left <= self.right
            and self.top <= other.bottom
            and other.top <= self.bottom
        )


def pareto(results: Results) -> str:
    """Return the picture; empty for fewer than two models with KL and quality."""
    points = [
        (model, model.kl, quality)
        for model in results.placed()
        if model.kl and (quality := results.quality(model))
    ]
    if len(points) < 2:
        return ""
    across = value_axis((end for _, kl, _ in points for end in _ends(kl)), _LEFT, _RIGHT, is_log=False)
    up = value_axis((end for *_, quality in points for end in _ends(quality)), _BOTTOM, _TOP, is_log=False)
    measure = "score" if results.has_scores else f"win rate over {_short(results.base)}"
    frontier = results.frontier()
    places = [(across.place(kl.value), up.place(quality.value)) for _, kl, quality in points]
    bars = [_bars(across, up, kl, quality) for _, kl, quality in points]
    marks = [
        _mark(model, own, place, f"KL {number(kl.value)}, {number(quality.value)}", is_best=model in frontier)
        for (model, kl, quality), own, place in zip(points, bars, places, strict=True)
    ]
    line = _frontier_places(results, frontier, across, up)
    lines = [*_boxes(line), *(bar for own in bars for bar in own)]
    labels = _point_labels([_short(model.name) for model, *_ in points], places, lines)
    name = f"{measure} against KL to {results.base}"
    return (
        f'<svg class="pareto" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{_plain(name)}">{_axes(across, up, measure, results.base)}'
        f"{_frontier_line(line)}{''.join(marks)}{labels}</svg>"
    )


def place_labels(
    widths: Sequence[float], points: Sequence[Place], lines: Sequence[Box] = ()
) -> list[Box | None]:
    """Return a box for each label near its point that overlaps no point, no other box and no edge.

    Args:
        widths: of the labels, in units of the picture.
        points: of the labels.
        lines: parts of lines, which a label avoids if there is another place.

    Returns:
        None for a label without a free place.
    """
    taken = [Box(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points]
    found: list[Box | None] = [None] * len(points)
    for index in sorted(range(len(points)), key=lambda at: points[at]):
        x, y = points[index]
        near = [
            other - x
            for other, height in points
            if abs(height - y) < _LINE and abs(other - x) < widths[index]
        ]
        leftward = max(near) > 0 == min(near)  # its label beyond the neighbour's would cross that one's line
        inside = [box for box in _candidates(x, y, widths[index], leftward=leftward) if _is_inside(box)]
        free = [box for box in inside if not any(map(box.overlaps, taken))]
        clear = (box for box in free if not any(map(box.overlaps, lines)))
        found[index] = box = next(clear, free[0] if free else None)
        taken += [] if box is None else [box]
    return found


def _is_inside(box: Box) -> bool:
    return box.left >= _LEFT and box.right <= _WIDTH and box.top >= 0 and box.bottom <= _BOTTOM


def _candidates(x: float, y: float, width: float, *, leftward: bool) -> list[Box]:
    """Return places of a label, the nearest first: right, left, above and below its point, also diagonal.

    Args:
        leftward: whether left is before right.
    """
    boxes = []
    for away in _AWAY:
        lifts = (0.0,) if away == _AWAY[0] else (0.0, -away, away)
        sides = (x - away - width, x + away) if leftward else (x + away, x - away - width)
        boxes += [_box(left, y + lift - _LINE / 2, width) for lift in lifts for left in sides]
        boxes.append(_box(x - width / 2, y - away - _LINE, width))
        boxes.append(_box(x - width / 2, y + away, width))
    return boxes


def _box(left: float, top: float, width: float) -> Box:
    return Box(left, top, left + width, top + _LINE)


def _point_labels(names: Sequence[str], points: Sequence[Place], lines: Sequence[Box]) -> str:
    """Return the labels, with a line to their point if they are not beside it; the last resort is a title."""
    parts = []
    boxes = place_labels([_width(name) for name in names], points, lines)
    for name, (x, y), box in zip(names, points, boxes, strict=True):
        if box is None:
            continue
        nearest_x, nearest_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
        if abs(nearest_x - x) + abs(nearest_y - y) > _AWAY[1]:
            parts.append(
                f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{nearest_x:.1f}" y2="{nearest_y:.1f}"/>'
            )
        parts.append(f'<text x="{box.left:.1f}" y="{box.bottom - 4:.1f}">{_plain(name)}</text>')
    return "".join(parts)


def _mark(model: Model, bars: Sequence[Box], place: Place, text: str, *, is_best: bool) -> str:
    x, y = place
    lines = "".join(_line("interval", *bar) for bar in bars)
    kind = "" if is_best else ' class="behind"'
    return (
        f'{lines}<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="{_POINT:.0f}">'
        f"<title>{_plain(f'{model.name}: {text}')}</title></circle>"
    )


def _bars(across: Axis, up: Axis, kl: Estimate, quality: Estimate) -> list[Box]:
    """Return the intervals of a point as lines."""
    x, y = across.place(kl.value), up.place(quality.value)
    bars = []
    if kl.low is not None and kl.high is not None:
        bars.append(Box(across.place(kl.low), y, across.place(kl.high), y))
    if quality.low is not None and quality.high is not None:
        bars.append(Box(x, up.place(quality.high), x, up.place(quality.low)))
    return bars


def _frontier_places(results: Results, frontier: Sequence[Model], across: Axis, up: Axis) -> list[Place]:
    return [
        (across.place(model.kl.value), up.place(quality.value))
        for model in frontier
        if model.kl and (quality := results.quality(model))
    ]


def _frontier_line(places: Sequence[Place]) -> str:
    """Return the frontier as steps: the best quality within a KL."""
    if len(places) < 2:
        return ""
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    return f'<path class="frontier" d="M{places[0][0]:.1f} {places[0][1]:.1f}{steps}"/>'


def _boxes(places: Sequence[Place]) -> list[Box]:
    """Return the parts of the frontier."""
    parts = [(Box(x, y, to_x, y), Box(to_x, to_y, to_x, y)) for (x, y), (to_x, to_y) in pairwise(places)]
    return [part for both in parts for part in both]


def _axes(across: Axis, up: Axis, measure: str, base: str) -> str:
    parts = []
    horizontal, vertical = across.ticks(_TICKS), up.ticks(_TICKS)
    for value, text in zip(horizontal, tick_texts(horizontal), strict=True):
        x = across.place(value)
        parts.append(_line("grid", x, _TOP, x, _BOTTOM))
        parts.append(
            f'<text class="ticks" x="{x:.1f}" y="{_BOTTOM + 16:.1f}" text-anchor="middle">{text}</text>'
        )
    for value, text in zip(vertical, tick_texts(vertical), strict=True):
        y = up.place(value)
        parts.append(_line("grid", _LEFT, y, _RIGHT, y))
        parts.append(
            f'<text class="ticks" x="{_LEFT - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    middle = (_LEFT + _RIGHT) / 2
    below = _plain(f"KL to {_short(base)}, nats per response")
    parts.append(f'<text x="{middle:.1f}" y="{_BOTTOM + 40:.1f}" text-anchor="middle">{below}</text>')
    height = (_TOP + _BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{height:.1f}" text-anchor="middle" transform="rotate(-90 14 {height:.1f})">'
        f"{_plain(measure)}</text>"
    )
    return "".join(parts)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _ends(estimate: Estimate) -> list[float]:
    return [end for end in (estimate.value, estimate.low, estimate.high) if end is not None]


def _short(name: str) -> str:
    return name if len(name) <= _LABEL_CHARACTERS else name[: _LABEL_CHARACTERS - 1] + "\u2026"


def _plain(text: str) -> str:
    """Return text for SVG, in which no HTML element may be."""
    return escape(printable(text))


def _width(text: str) -> float:
    """Return an upper bound of the width of a label."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return _CHARACTER * (len(printable(text)) + wide)


_MOST_MODELS = 8
_MOST_ORDERED = 50
"""Prompts of a filter that are ordered by differences; the others follow in the order of the data."""
_VERDICTS = {1.0: "wins over", 0.5: "ties with", 0.0: "loses to"}


def all_labels(results: Results) -> list[str]:
    """Return the labels of all filters by verdict, in their order."""
    return [_label(model, results, credit) for model in _filtered(results) for credit in _VERDICTS]


def verdict_labels(row: Row, results: Results) -> Iterator[str]:
    """Yield the labels of the verdicts in a row of `answers.jsonl`."""
    for model in _filtered(results):
        credit = _credit(row, model, results)
        if credit is not None:
            yield _label(model, results, credit)


class Places:
    """Places of prompts by the differences of scores, as classes that `order_style` sorts."""

    def __init__(self, results: Results):
        self._results = results
        self._differences: dict[int, list[tuple[float, int]]] = {}

    def add(self, line: int, row: Row) -> None:
        """Add the row of a line."""
        for at, model in enumerate(_filtered(self._results)):
            if difference := _difference(row, model, self._results):
                self._differences.setdefault(at, []).append((-abs(difference), line))

    def classes(self) -> dict[int, list[str]]:
        """Return by line the classes of its places, of each model's largest differences."""
        found: dict[int, list[str]] = {}
        for at, of_model in self._differences.items():
            for place, (_, line) in enumerate(heapq.nsmallest(_MOST_ORDERED, of_model)):
                found.setdefault(line, []).append(_class(at, place))
        return found


def order_style(labels: Sequence[str], classes: Iterable[Iterable[str]], results: Results) -> str:
    """Return the style sheet by which a filter by verdict shows the largest differences first.

    Args:
        labels: of the filters, which are called f0, f1, ...
        classes: of `Places`.
        results: of the comparison.
    """
    known = {name for of_line in classes for name in of_line}
    style = ["", ".prompts { display: flex; flex-direction: column; } .prompts > * { flex: none; }"]
    for at, model in enumerate(_filtered(results)):
        own = [_label(model, results, credit) for credit in _VERDICTS]
        filters = [f"#filter-f{labels.index(label)}" for label in own if label in labels]
        used = [place for place in range(_MOST_ORDERED) if _class(at, place) in known]
        if filters and used:
            style += [f".{_class(at, place)} {{ --order{at}: {place}; }}" for place in used]
            selected = f":is({', '.join(filters)}):checked ~ .prompts > *"
            style.append(f"{selected} {{ order: var(--order{at}, {_MOST_ORDERED}); }}")
    return "\n".join(style)


def _filtered(results: Results) -> Sequence[Model]:
    return results.models[1 : _MOST_MODELS + 1]


def _class(model: int, place: int) -> str:
    return f"m{model}p{place}"


def _credit(row: Row, model: Model, results: Results) -> float | None:
    """Return 1 for a response that is better than that of the base, 0 for a worse one, 0.5 for a tie.

    Rows of versions without verdicts have scores or nothing.
    """
    for verdict in row.get("verdicts") or ():
        if isinstance(verdict, dict) and (verdict.get("first"), verdict.get("second")) == (
            results.base,
            model.name,
        ):
            of_base = finite(verdict.get("credit"))
            return None if of_base is None else 1 - of_base
    difference = _difference(row, model, results)
    return None if difference is None else 0.5 + 0.5 * ((difference > 0) - (difference < 0))


def _difference(row: Row, model: Model, results: Results) -> float | None:
    """Return the score of a model's response minus that of the base; None without one of them."""
    score, base = (finite(response_of(row, name).get("score")) for name in (model.name, results.base))
    return None if score is None or base is None else score - base


def _label(model: Model, results: Results, credit: float) -> str:
    verdict = _VERDICTS.get(credit, _VERDICTS[0.5])
    return f"{cut(model.name)} {verdict} {cut(results.base)}"


_LONGEST_TEXTS = (6000, 3000, 1500)
# Of a prompt that alone would need much of the page: a character can need 70 bytes of HTML.
_SHORT_TEXT, _MUCH = 200, 0.05
# HTML per byte of text: marks of words that differ. HTML of a prompt without its texts.
_GROWTH, _ITEM_BYTES = 1.6, 2000
_MOST_SOURCES, _MOST_RANGES = 8, 40

_UNFINISHED, _EMPTY = "a response does not end", "a response is empty"

PROMPTS_STYLE = """
.switch { position: absolute; opacity: 0; width: 1px; height: 1px; }
.filters { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0; }
.filters label, .filters input { border: 1px solid var(--line); border-radius: 6px; padding: 3px 12px; }
.filters label { cursor: pointer; font-size: 13px; background: var(--tile); overflow-wrap: anywhere; }
.filters input { font: inherit; font-size: 14px; flex: 1 1 220px; min-width: 0; max-width: 420px; }
[hidden] { display: none !important; }
.quiet { color: var(--quiet); font-size: 13px; }
"""

SCRIPT = """
const search = document.getElementById("search"), found = document.getElementById("found");
if (search) {
  const items = [...document.querySelectorAll(".prompt")];
  const texts = new Map();
  const update = () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      if (words.length && !texts.has(item)) texts.set(item, item.textContent.toLowerCase());
      item.hidden = !words.every((word) => texts.get(item).includes(word));
      if (getComputedStyle(item).display !== "none") shown += 1;
    }
    found.textContent = shown + " of " + items.length + " prompts";
  };
  search.hidden = found.hidden = false;
  search.addEventListener("input", update);
  for (const input of document.querySelectorAll("input.switch")) input.addEventListener("change", update);
  update();
}
"""


@dataclass(frozen=True)
class Section:
    """The section and the style sheet of its filters."""

    html: str
    style: str


@dataclass(frozen=True)
class _Survey:
    """The rows of the file before any is shown.

    Attributes:
        labels: of filters.
        longest: characters that a text may have.
        rows: their number.
        ranks: by line, classes of the places by differences of scores.
    """

    labels: Sequence[str]
    longest: int
    rows: int
    ranks: Mapping[int, Sequence[str]]


def prompts_section(file: Path, results: Results, room: int) -> Section:
    """Return the prompts of `answers.jsonl` in at most about `room` bytes of HTML.

    Prompts without room are omitted, and the section says which.

    Raises:
        OSError: the file cannot be read.
    """
    survey = _survey(file, results, room)
    items: list[str] = []
    counts = Counter[str]()
    omitted: list[int] = []
    damaged, used = 0, 0
    for line, row in enumerate(json_rows(file), start=1):
        if row is None or not isinstance(row.get("responses"), dict):
            damaged += 1
            continue
        labels = [label for label in _labels(row, results) if label in survey.labels]
        kinds = [*(f"f{survey.labels.index(label)}" for label in labels), *survey.ranks.get(line, ())]
        item = _item(row, kinds, survey, results, room - used, room)
        if not item:
            omitted.append(line)
            continue
        counts.update(labels)
        items.append(item)
        used += html_bytes(item)
    notes = _notes(omitted, damaged, survey)
    if not items:
        return Section(f"<section><h2>Responses</h2>{notes}</section>" if notes else "", "")
    switches, buttons, style = _filters(survey.labels, counts, len(items))
    style += order_style(survey.labels, survey.ranks.values(), results)
    html = (
        f'<section><h2>Responses</h2><p class="quiet">Marked words are not in the response of '
        f"{inert_html(results.base)}. Texts of data and models can be offensive or private.</p>{notes}"
        f'{switches}{buttons}<div class="prompts">{"".join(items)}</div></section>'
    )
    return Section(html, style)


def _survey(file: Path, results: Results, room: int) -> _Survey:
    labels, sources = Counter[str](), Counter[str]()
    sizes = dict.fromkeys(_LONGEST_TEXTS, 0.0)
    rows = 0
    places = Places(results)
    for line, row in enumerate(json_rows(file), start=1):
        if row is None or not isinstance(row.get("responses"), dict):
            continue
        rows += 1
        source, *others = _labels(row, results)
        sources[source] += 1
        labels.update(others)
        places.add(line, row)
        texts = [text_of(row, "prompt"), text_of(row, "chosen")]
        texts += [text_of(response_of(row, model.name), "text") for model in results.models]
        for longest in sizes:
            sizes[longest] += _ITEM_BYTES + _GROWTH * sum(
                html_bytes((text or "")[:longest]) for text in texts
            )
    longest = next((each for each in _LONGEST_TEXTS if sizes[each] <= room), _LONGEST_TEXTS[-1])
    shown = [label for label, _ in sources.most_common(_MOST_SOURCES)] if len(sources) > 1 else []
    shown += [label for label in (_UNFINISHED, _EMPTY, *all_labels(results)) if labels[label]]
    return _Survey(shown, longest, rows, places.classes())


def _labels(row: Row, results: Results) -> Iterator[str]:
    """Yield the labels of the filters that show this prompt, that of its source first."""
    yield f"source {cut(text_of(row, 'source') or 'not known')}"
    responses = [response_of(row, model.name) for model in results.models]
    if any(each.get("finished") is False for each in responses):
        yield _UNFINISHED
    if any(not (text_of(each, "text") or "").strip() for each in responses):
        yield _EMPTY
    yield from verdict_labels(row, results)


def _item(row: Row, kinds: Sequence[str], survey: _Survey, results: Results, left: int, room: int) -> str:
    """Return a prompt with its responses, folded; empty without room."""
    if left < _ITEM_BYTES:
        return ""
    prompt = text_of(row, "prompt") or ""
    head = f'<details class="prompt {" ".join(kinds)}"><summary dir="auto">{prompt_title(prompt)}'
    small = f" <small>{inert_html('; '.join(_labels(row, results)))}</small></summary>"
    responses = list(_responses(row, results))
    item = f"{head}{small}{side_by_side(prompt, responses, results.base, survey.longest)}</details>"
    if html_bytes(item) > _MUCH * room:
        item = f"{head}{small}{side_by_side(prompt, responses, results.base, _SHORT_TEXT)}</details>"
    return item if html_bytes(item) <= left else ""


def _responses(row: Row, results: Results) -> Iterator[Response]:
    for model in results.models:
        response = response_of(row, model.name)
        notes = [end_notes(response.get("tokens"), response.get("finished"))]
        score, logp, base = (finite(response.get(name)) for name in ("score", "logp", "base_logp"))
        if score is not None:
            notes.append(f"score {number(score)}")
        if logp is not None and base is not None and model.name != results.base:
            notes.append(f"log-ratio {number(logp - base)} nats")
        yield Response(model.name, text_of(response, "text"), "; ".join(filter(None, notes)))
    if isinstance(row.get("chosen"), str):
        yield Response("chosen in the data", row["chosen"])


def _filters(labels: Sequence[str], counts: Mapping[str, int], items: int) -> tuple[str, str, str]:
    """Return the switches, their buttons and the style sheet that makes them work without script."""
    shown = [("all", f"all ({items:,})")]
    shown += [(f"f{at}", f"{label} ({counts[label]:,})") for at, label in enumerate(labels) if counts[label]]
    switches, buttons, style = [], [], []
    for name, text in shown:
        is_on = " checked" if name == "all" else ""
        switches.append(f'<input type="radio" class="switch" name="filter" id="filter-{name}"{is_on}>')
        buttons.append(f'<label for="filter-{name}">{inert_html(text)}</label>')
        button = f"~ .filters label[for=filter-{name}]"
        style.append(f"#filter-{name}:checked {button} {{ border-color: var(--best); font-weight: 600; }}")
        style.append(f"#filter-{name}:focus-visible {button} {{ outline: 2px solid var(--best); }}")
        if name != "all":
            style.append(f"#filter-{name}:checked ~ .prompts > :not(.{name}) {{ display: none; }}")
    search = '<input type="search" id="search" placeholder="words of a prompt or response" hidden '
    search += 'aria-label="words of a prompt or response"><span id="found" class="quiet" hidden></span>'
    return "".join(switches), f'<div class="filters">{"".join(buttons)}{search}</div>', "\n".join(style)


def _notes(omitted: Sequence[int], damaged: int, survey: _Survey) -> str:
    notes = []
    if omitted:
        notes.append(
            f"{len(omitted):,} of {counted(survey.rows, 'prompt')} are not on this page, which would be too "
            f"large: {_ranges(omitted)} of answers.jsonl."
        )
    if damaged:
        notes.append(f"{counted(damaged, 'line')} of answers.jsonl cannot be read.")
    return f"<p>{' '.join(notes)}</p>" if notes else ""


def _ranges(lines: Sequence[int]) -> str:
    """Return "lines 3, 5 to 9"; of many ranges the first ones."""
    ranges: list[list[int]] = []
    for line in lines:
        if ranges and ranges[-1][1] == line - 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    texts = [
        f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in ranges[:_MOST_RANGES]
    ]
    texts += ["and others"] if len(ranges) > _MOST_RANGES else []
    return f"{'line' if len(lines) == 1 else 'lines'} {', '.join(texts)}"


MOST_BYTES = 5_000_000
_FRAME_BYTES = 60_000

_STYLE = """
:root { --best: #1f6fc4; --better: #d3e8fb; --worse: #fbe0cc; }
@media (prefers-color-scheme: dark) { :root { --best: #7db7f5; --better: #173a5a; --worse: #5a3213; } }
main { max-width: 1560px; }
.headline { font-size: 19px; line-height: 1.4; margin: 12px 0; max-width: 900px; overflow-wrap: anywhere; }
.warnings { margin: 8px 0; padding-left: 20px; max-width: 900px; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 14px; } h1 { font-size: 22px; } }
"""


def write_comparison_page(folder: Path) -> None:
    """Write `comparison.html` from `comparison.json` and `answers.jsonl` in the same folder.

    Args:
        folder: `<run.dir>/comparison`.

    Raises:
        DataError: `comparison.json` cannot be read.
        OSError: a file cannot be read or written.
    """
    names = RunFolder(folder)
    results = read_results(folder / names.comparison_results.name)
    head = [_first_screen(results), *_sections(results)]
    used = sum(len(part.encode("utf-8", "replace")) for part in head)
    prompts = prompts_section(
        folder / names.comparison_answers.name, results, MOST_BYTES - _FRAME_BYTES - used
    )
    style = _STYLE + SIDE_STYLE + TABLES_STYLE + PARETO_STYLE + PROMPTS_STYLE + prompts.style
    page = html_page("Comparison of models", [*head, prompts.html], style, SCRIPT)
    files.write_text(folder / names.comparison_page.name, page)


def _first_screen(results: Results) -> str:
    found = warnings(results)
    items = "".join(f"<li>{inert_html(text)}</li>" for text in found)
    judge = "no judge" if results.judge is None else f"judge: {results.judge}"
    about = f"{counted(len(results.models), 'model')}, {counted(results.prompts, 'prompt')}, {judge}"
    return (
        f'<header><h1>Comparison of models</h1></header><p class="quiet">{inert_html(about)}</p>'
        f'<p class="headline">{inert_html(headline(results))}</p>'
        + (f'<ul class="warnings">{items}</ul>' if found else "")
    )


def _sections(results: Results) -> list[str]:
    measure = "score" if results.has_scores else f"win rate over {inert_html(results.base)}"
    picture = pareto(results)
    note = (
        f"<p>Bars: 95 % intervals over prompts. Dashed: the frontier, the best {measure} within a KL. "
        "Hollow: by the means, another model reaches at least this with less KL; "
        "the table of differences has the intervals.</p>"
    )
    matrix = win_matrix(results)
    return [
        section("models", "Models", models_table(results) + _kl_note(results)),
        section("kl", "KL and quality", f'<div class="wide">{picture}</div>{note}' if picture else ""),
        section("wins", "Win rates", matrix + _verdicts(results) if matrix else ""),
        section("differences", "Differences", differences_table(results)),
        section("style", "Style", style_table(results)),
    ]


def _kl_note(results: Results) -> str:
    if results.temperature in (None, 1.0):
        return ""
    return (
        f"<p>Sampled at a temperature of {results.temperature:g}: the KL is that of likelier responses. "
        "Only at 1 it has no bias.</p>"
    )


def _verdicts(results: Results) -> str:
    """Return how responses were judged: positions, and counts of the judge."""
    text = (
        "The judge compared every two responses in both positions; a verdict that changes with the position "
        "is a tie."
        if results.compares
        else "The judge gave every response a score, so no positions are swapped: the higher score wins."
    )
    counts = "; ".join(f"{name.replace('_', ' ')}: {number:,}" for name, number in results.notes.items())
    return f"<p>{text}{f' Counts: {inert_html(counts)}.' if counts else ''}</p>"
