"""Small pictures for pages, as inline SVG: histograms and bars. Colours are classes of the page's style."""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import Any

import dpo_dist
from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import plain as finite
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import number, percent, without_secrets
from dpo_dist.insight.doctor.examine import Diagnosis
from dpo_dist.insight.doctor.findings import (
    Across,
    Distribution,
    Finding,
    LeakTest,
    Level,
    SideReport,
    SourceReport,
)
from dpo_dist.insight.doctor.margins import StoreUse
from dpo_dist.insight.doctor.shown_pairs import Kind, Part, Segment, ShownPair
from dpo_dist.insight.pages.render import html_page, inert_html, joined_origins, section, table

_WIDTH, _HEIGHT, _AXIS = 360.0, 92.0, 18.0
_LABEL_WIDTH = 44.0

Scale = Callable[[float], float]
"""From a value to its place on the horizontal axis."""


def histogram(values: Distribution, title: str, limit: float | None = None) -> str:
    """Return a histogram with a logarithmic axis for numbers from 0.

    Args:
        values: the distribution.
        title: text for readers that see no pictures.
        limit: a value to mark by a line, if it is on the axis.
    """
    low, high = values.edges[0], values.edges[-1]
    scale = _scale(low, high)
    largest = max(values.counts, default=0) or 1
    bars = []
    for start, stop, count in zip(values.edges, values.edges[1:], values.counts, strict=False):
        if count:
            x, height = scale(start), max(1.0, count / largest * _HEIGHT)
            width = max(1.0, scale(stop) - x - 0.5)
            label = f"{number(start, 3)} to {number(stop, 3)}: {count:,}"
            bars.append(_rect(x, _HEIGHT - height, width, height, label))
    line = ""
    if limit is not None and low <= limit <= high:
        x = scale(limit)
        name = f"<title>{number(limit, 3)}</title>"
        line = f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}">{name}</line>'
    axis = f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>{_ticks(values, scale)}'
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT + _AXIS:.0f}" role="img" '
        f'aria-label="{escape(printable(title))}">{"".join(bars)}{line}{axis}</svg>'
    )


def share_bar(share: float, title: str, low: float = 0.0) -> str:
    """Return a bar from `low` to `share` on an axis from `low` to 1."""
    width = 120 * min(max((share - low) / (1 - low), 0.0), 1.0)
    return (
        f'<svg class="bar" viewBox="0 0 120 10" role="img" aria-label="{escape(title)}">'
        f'<rect class="track" width="120" height="10" rx="3"/>{_rect(0, 0, width, 10, title)}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, title: str) -> str:
    return (
        f'<rect class="fill" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _scale(low: float, high: float) -> Scale:
    """Return a logarithmic scale for numbers from 0, a linear one if some are negative."""
    if low < 0:
        return lambda value: (value - low) / ((high - low) or 1.0) * _WIDTH
    first, span = math.log1p(low), (math.log1p(high) - math.log1p(low)) or 1.0
    return lambda value: (math.log1p(value) - first) / span * _WIDTH


def _ticks(values: Distribution, scale: Scale) -> str:
    """Return labels at the smallest, median and largest value, and between them where there is room."""
    places: list[float] = []
    labels = ""
    percentiles = values.percentiles
    for value in (
        values.smallest,
        values.largest,
        *(percentiles[p] for p in (50, 95, 25) if p in percentiles),
    ):
        x = scale(value)
        if all(abs(x - other) > _LABEL_WIDTH for other in places):
            places.append(x)
            anchor = "start" if x < _LABEL_WIDTH / 2 else "end" if x > _WIDTH - _LABEL_WIDTH / 2 else "middle"
            labels += f'<text x="{x:.1f}" y="{_HEIGHT + 13}" text-anchor="{anchor}">{number(value, 3)}</text>'
    return labels


DOCTOR_STYLE = """
:root { --error: #b3264a; --warning: #a85b06; --note: #4b6a9b; --fill: #4c78a8; --trained: #d5efe0; }
:root { --special: #e4e0f7; --cut: #f6dede; }
@media (prefers-color-scheme: dark) {
  :root { --fill: #7aa6d8; --trained: #17402c; --special: #352f5c; --cut: #552a2f; }
}
nav a { margin-right: 14px; }
h4 { font-size: 13px; font-weight: 600; color: var(--quiet); margin: 12px 0 4px; }
.badge { font-size: 13px; padding: 1px 10px; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 10px 0; }
article p { margin: 6px 0; overflow-wrap: anywhere; }
.finding { border-left: 4px solid var(--note); }
.finding.error { border-left-color: var(--error); }
.finding.warning { border-left-color: var(--warning); }
.head { display: flex; gap: 8px; align-items: center; flex-wrap: wrap; }
.head small, summary small { color: var(--quiet); font-weight: 400; overflow-wrap: anywhere; }
.wide td { overflow-wrap: normal; min-width: 60px; }
.wide .facts td { overflow-wrap: anywhere; }
.numbers td:first-child, .numbers th:first-child { text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: 18px; }
figure { margin: 0; flex: 1 1 260px; max-width: 400px; }
figcaption { font-size: 13px; margin-bottom: 4px; }
figure small { color: var(--quiet); font-size: 12px; }
.chart { width: 100%; height: auto; }
.chart text { font-size: 11px; fill: var(--quiet); }
.fill { fill: var(--fill); }
.track { fill: var(--line); }
.axis { stroke: var(--line); }
.limit { stroke: var(--error); stroke-dasharray: 4 3; }
.bar { width: 120px; height: 10px; }
.warning:is(p) { border-left: 4px solid var(--warning); padding-left: 12px; }
.switch { position: absolute; opacity: 0; width: 1px; height: 1px; }
.button { display: inline-block; border: 1px solid var(--line); border-radius: 6px; padding: 3px 12px; }
.button { cursor: pointer; font-size: 13px; margin: 6px 0; background: var(--tile); }
.switch:focus-visible + .button { outline: 2px solid var(--fill); }
.switch:checked + .button { border-color: var(--fill); }
.texts { display: none; }
.switch:checked ~ .texts, #all-texts:checked ~ .pairs .texts { display: block; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font-size: 14px; }
.text { border: 1px solid var(--line); border-radius: 6px; padding: 8px 10px; }
.text { max-height: 420px; overflow-y: auto; }
.legend span, .legend i { margin-right: 10px; }
.trained { background: var(--trained); }
.special { background: var(--special); border-radius: 4px; font: 12px ui-monospace, monospace; }
.cut { background: var(--cut); text-decoration: line-through; }
.omitted { color: var(--quiet); font-style: italic; display: block; }
@media (max-width: 640px) { main { padding: 14px; } h1 { font-size: 22px; } }
"""


_LEGEND = (
    '<p class="legend"><span class="trained">counted by the loss</span> <span>context</span> '
    '<span class="special">special token</span> <span class="cut">cut by data.max_length</span> '
    '<i class="mark">U+200B</i> invisible character</p>'
)


def pairs_section(pairs: Sequence[ShownPair]) -> str:
    """Return the records of the page, grouped by source; empty without any."""
    if not pairs:
        return ""
    shown = "".join(_pair(number, pair) for number, pair in enumerate(pairs))
    # Inputs and labels open the texts without a script.
    return (
        '<section id="pairs"><h2>Records, decoded</h2>'
        '<p class="warning">Texts of the data can be offensive or private. They are hidden until you open '
        "them; doctor.texts=false makes a page without texts.</p>"
        '<input type="checkbox" id="all-texts" class="switch"><label for="all-texts" class="button">'
        f'Show all {len(pairs)} texts</label>{_LEGEND}<div class="pairs">{shown}</div></section>'
    )


def _pair(number: int, pair: ShownPair) -> str:
    rules = "".join(f'<span class="badge">{inert_html(rule)}</span>' for rule in pair.rules)
    note = f'<span class="badge error">dropped: {inert_html(pair.note)}</span>' if pair.note else ""
    return (
        f'<article><div class="head"><code>{inert_html(pair.origin)}</code>{rules}{note}</div>'
        f'<input type="checkbox" id="text-{number}" class="switch">'
        f'<label for="text-{number}" class="button">Show texts</label>'
        f'<div class="texts">{"".join(map(_part, pair.parts))}</div></article>'
    )


def _part(part: Part) -> str:
    facts = [part.name]
    facts += [f"{part.tokens:,} tokens"] if part.tokens is not None else []
    facts += [f"score {part.score:g}"] if part.score is not None else []
    body = "".join(map(_segment, part.segments))
    return f'<h4>{escape(", ".join(facts))}</h4><div class="text" dir="auto">{body}</div>'


def _segment(segment: Segment) -> str:
    if segment.kind is Kind.omitted:
        return f'<span class="omitted">{escape(segment.text)} not shown</span>'
    names = {
        "special": segment.kind is Kind.special,
        "trained": segment.is_trained,
        "cut": segment.is_cut,
    }
    classes = " ".join(name for name, applies in names.items() if applies)
    return f'<span class="{classes}">{inert_html(segment.text)}</span>'


_MAX_ROWS = 12
_SHOWN_EXAMPLES = 5


def overview(sources: Sequence[SourceReport]) -> str:
    """Return the table of all sources."""
    head = (
        "source",
        "data",
        "read",
        "kept",
        "dropped",
        "examples",
        "chosen",
        "rejected",
        "shared prompts save",
    )
    return table(head, map(_row, sources), "numbers")


def source_section(source: SourceReport, max_length: int) -> str:
    """Return everything about one source."""
    parts = (
        ("Dropped records", _dropped(source)),
        ("Changed by encoding", _counts(source.changed)),
        ("Lengths", _lengths(source, max_length)),
        ("Can the chosen response be guessed from its form?", _leaks(source.leaks)),
        ("Scores", _values(source.scores)),
        ("Margins of the reference model", _values(source.margins)),
        ("Languages of prompts", _shares(source.languages)),
        ("Shares of records", _shares(source.shares)),
        ("Notes", "".join(f"<p>{inert_html(note)}</p>" for note in source.notes)),
    )
    shown = "".join(f"<h3>{title}</h3>{content}" for title, content in parts if content)
    title = f"{inert_html(source.label)} <small>{source.kept:,} of {source.read:,} records kept</small>"
    path = f"<p><code>{inert_html(str(without_secrets(source.path)))}</code></p>"
    return f"<details open><summary>{title}</summary>{path}{shown}</details>"


def _row(source: SourceReport) -> tuple[str, ...]:
    sharing = f"{percent(source.prefix.share)} of tokens" if source.prefix is not None else ""
    return (
        inert_html(source.label),
        "evaluation" if source.is_eval else "<br>".join(source.parts or ["training"]),
        f"{source.read:,}",
        f"{source.kept:,}",
        f"{source.read - source.kept:,}",
        f"{source.pairs:,}",
        *(_median(source.sides.get(side)) for side in ("chosen", "rejected")),
        sharing,
    )


def _median(side: SideReport | None) -> str:
    """Return the median length of a side in its best unit."""
    if side is None:
        return ""
    values, unit = (side.characters, "characters") if side.tokens is None else (side.tokens, "tokens")
    return f"{number(values.percentiles[50], 3)} {unit}"


def _dropped(source: SourceReport) -> str:
    rows = (
        (inert_html(reason), f"{found.count:,}", _origins(found.examples))
        for reason, found in sorted(source.dropped.items(), key=lambda item: -item[1].count)
    )
    return table(("reason", "records", "first ones"), rows)


def _origins(examples: Sequence[str]) -> str:
    return f"<code>{inert_html(joined_origins(examples, _SHOWN_EXAMPLES))}</code>" if examples else ""


def _counts(counts: Mapping[str, int]) -> str:
    rows = ((inert_html(name.replace("_", " ")), f"{count:,}") for name, count in counts.items() if count)
    return table(("change", "records"), rows)


def _lengths(source: SourceReport, max_length: int) -> str:
    figures = []
    for name, side in source.sides.items():
        values, unit = (side.characters, "characters") if side.tokens is None else (side.tokens, "tokens")
        cut = f", <b>{side.cut:,} cut</b> (by {side.cut_tokens:,} tokens)" if side.cut else ""
        picture = histogram(values, f"{name} lengths", max_length if side.tokens is not None else None)
        figures.append(
            f"<figure><figcaption>{escape(name)}, {unit}{cut}</figcaption>{picture}"
            f"<small>{_percentiles(values)}</small></figure>"
        )
    gain = ""
    if source.prefix is not None:
        gain = (
            f"<p>Computing each prompt once saves {percent(source.prefix.share)} of the tokens "
            f"({source.prefix.expected_gain:.2f} times fewer).</p>"
        )
    return f'<div class="figures">{"".join(figures)}</div>{gain}' if figures else ""


def _percentiles(values: Distribution) -> str:
    found = ", ".join(f"{percent} %: {number(value)}" for percent, value in values.percentiles.items())
    return f"mean {number(round(values.mean, 1))}, largest {number(values.largest)}; {found}"


def _leaks(leaks: Sequence[LeakTest]) -> str:
    """Return accuracies on an axis from one half, a guess, to one."""
    rows = (
        (
            inert_html(test.feature.replace("_", " ")),
            percent(test.accuracy),
            share_bar(test.accuracy, percent(test.accuracy), 0.5),
            f"{percent(test.low)} to {percent(test.high)}",
            percent(test.differs),
            inert_html(test.detail),
        )
        for test in leaks[:_MAX_ROWS]
    )
    return table(("feature", "accuracy", "", "interval", "sides differ", "detail"), rows)


def _values(values: Mapping[str, float]) -> str:
    rows = ((inert_html(name.replace("_", " ")), number(value)) for name, value in values.items())
    return table(("statistic", "value"), rows)


def _shares(shares: Mapping[str, float]) -> str:
    rows = (
        (inert_html(name.replace("_", " ")), percent(share), share_bar(share, percent(share)))
        for name, share in sorted(shares.items(), key=lambda item: -item[1])[:_MAX_ROWS]
        if share
    )
    return table(("", "share", ""), rows)


FORMAT = 1
"""Version of the schema of doctor.json, in docs/doctor.md."""


def check_writable(folder: RunFolder) -> None:
    """Raise ConfigError if the report could not be written, before hours of work; create nothing."""
    nearest = next(each for each in (folder.path, *folder.path.absolute().parents) if each.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ConfigError(
            "run.dir cannot be written",
            where="run.dir",
            got=str(folder.path),
            expected="a folder that exists or can be created",
            remedy="set run.dir to another folder, or make this one writable",
        )


def write_doctor_report(folder: RunFolder, diagnosis: Diagnosis, exit_code: int) -> None:
    """Write doctor.json; it has no texts of records, except single words that reveal a label."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "exit_code": int(exit_code),
        "model": str(diagnosis.model) if diagnosis.model is not None else None,
        "versions": {"dpo_dist": dpo_dist.__version__, "python": platform.python_version()},
        "store": None if diagnosis.store is None else diagnosis.store.as_dict(),
        **diagnosis.report.as_dict(),
    }
    files.write_text(folder.doctor_report, json.dumps(finite(content), indent=1, ensure_ascii=True) + "\n")


def write_doctor_page(folder: RunFolder, diagnosis: Diagnosis, config: RunConfig) -> None:
    """Write doctor.html."""
    report = diagnosis.report
    sections = (
        _header(diagnosis),
        section("findings", "Findings", "".join(map(_finding, report.findings)) or "<p>None.</p>"),
        section("sources", "Sources", overview(report.sources)),
        "".join(source_section(source, config.data.max_length) for source in report.sources),
        section("reference", "Margins of the reference model", _reference(diagnosis.store)),
        section("copies", "Copies and leakage, over all sources", _across(report.across)),
        pairs_section(diagnosis.shown),
        section("settings", "Settings", _settings(config, diagnosis)),
    )
    title = f"Data doctor: {folder.path.resolve().name}"
    files.write_text(folder.doctor_page, html_page(title, sections, DOCTOR_STYLE))


def _header(diagnosis: Diagnosis) -> str:
    findings = diagnosis.report.findings
    counts = {level: sum(finding.level is level for finding in findings) for level in reversed(Level)}
    badges = "".join(
        f'<span class="badge {level}">{count} {level}{"" if count == 1 else "s"}</span>'
        for level, count in counts.items()
        if count
    )
    records = sum(source.read for source in diagnosis.report.sources)
    kept = sum(source.kept for source in diagnosis.report.sources)
    without = (
        ""
        if diagnosis.model
        else "<p>Without a model (model.path): only texts were examined, not tokens.</p>"
    )
    links = "".join(
        f'<a href="#{name}">{name}</a> '
        for name in ("findings", "sources", "reference", "copies", "pairs", "settings")
    )
    badges = badges or '<span class="badge completed">no findings</span>'
    return (
        f"<header><h1>Data doctor</h1>{badges}</header>"
        f"<p>{kept:,} of {records:,} records can be used.</p>{without}<nav>{links}</nav>"
    )


def _finding(finding: Finding) -> str:
    where = inert_html(finding.source) if finding.source is not None else "several sources"
    origins = inert_html(joined_origins(finding.examples, _SHOWN_EXAMPLES)) if finding.examples else ""
    return (
        f'<article class="finding {finding.level}"><div class="head">'
        f'<span class="badge {finding.level}">{finding.level}</span><b>{escape(finding.rule)}</b>'
        f"<small>{where}</small></div>"
        f"<p>{inert_html(finding.text)}</p><p>To do: {inert_html(finding.remedy)}</p>"
        + (f"<p>First: <code>{origins}</code></p>" if origins else "")
        + "</article>"
    )


def _across(across: Across) -> str:
    rows = [
        ("equal to an earlier record", across.duplicates),
        ("equal or nearly equal to an earlier record", across.near_duplicates),
        ("state the opposite preference of another record", across.contradictions),
        ("have a prompt that occurred before", across.repeated_prompts),
        ("of evaluation, with a prompt of the training data", across.leaked_prompts),
        ("of evaluation, with nearly a prompt of the training data", across.near_leaked_prompts),
        ("overlap with a benchmark prompt", across.benchmark_hits),
    ]
    clusters = ", ".join(f"{size:,}" for size in across.clusters)
    note = f"<p>Largest groups of nearly equal records: {clusters} records.</p>" if clusters else ""
    return table(("records that", "number"), ((text, f"{count:,}") for text, count in rows), "facts") + note


def _reference(use: StoreUse | None) -> str:
    """Return the coverage of the store, and a histogram of each source's margins."""
    if use is None:
        return ""
    pictures = "".join(
        f"<figure><figcaption>{inert_html(label)}, nats per token</figcaption>"
        f"{histogram(margins, f'margins of {label}', 0.0)}"
        f"<small>{margins.count:,} pairs, median {number(margins.percentiles[50], 3)}; below 0 the reference "
        "prefers the rejected response</small></figure>"
        for label, margins in use.margins
    )
    figures = f'<div class="figures">{pictures}</div>' if pictures else ""
    return f"<p>{inert_html(use.sentence)}</p>{figures}"


def _settings(config: RunConfig, diagnosis: Diagnosis) -> str:
    keys = [
        (f"{name}.{field.name}", plain(getattr(content, field.name)))
        for name, content in (("data", config.data), ("doctor", config.doctor))
        for field in fields(content)
    ]
    rows = [
        ("model", diagnosis.model or "none"),
        *keys,
        ("versions", f"dpo_dist {dpo_dist.__version__}, Python {platform.python_version()}"),
    ]
    return table(
        ("key", "value"),
        ((escape(key), inert_html(str(without_secrets(str(value))))) for key, value in rows),
        "facts",
    )
