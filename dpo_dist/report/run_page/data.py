"""Section about the data: counts of records in words, and the doctor's findings."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from dpo_dist.data.count_words import in_words
from dpo_dist.plurals import counted
from dpo_dist.report.inert import inert_html, joined_origins
from dpo_dist.report.run_page.blocks import facts_table, folded, note, paragraph, section, table
from dpo_dist.report.run_page.facts import Fields, PageFacts
from dpo_dist.report.run_page.wording import percent

_PARTS = {"train": "Training data", "eval": "Evaluation data"}
_NOT_SHOWN = frozenset({"read", "kept", "pairs"})
_MOST_FINDINGS = 50
_SHOWN_EXAMPLES = 5
_LEVELS = ("error", "warning", "note")


def data_section(facts: PageFacts) -> str:
    """Return counts of both datasets and the doctor's findings; empty without any."""
    data = facts.section("data")
    parts = {"train": data} if "read" in data else data  # of early versions: of the training data only
    counts = [_counts(_PARTS.get(name, name), found) for name, found in parts.items() if found]
    doctor = _doctor(facts.doctor)
    missing = note(
        "The doctor has not examined these data. It finds copies, leaks, labels that the length gives "
        "away and more: python -m dpo_dist.doctor with the configuration of this run."
    )
    return section("data", "Data", *counts, doctor or (missing if counts else ""))


def _counts(title: str, counts: Fields) -> str:
    read, kept = counts.get("read") or 0, counts.get("kept") or 0
    sources = counts.get("sources") or []
    pairs = counts.get("pairs")
    of = f" of {counted(len(sources), 'source')}" if len(sources) > 1 else ""
    head = f"{kept:,} of {counted(read, 'record')}{of} kept"
    head += f", as {counted(pairs, 'pair')}." if pairs not in (None, kept) else "."
    rows = [*_dropped(counts.get("dropped") or {}, read), *_changed(counts, kept)]
    return (
        f"<h3>{title}</h3>{paragraph(head)}{table(('records', 'share', 'meaning', 'count'), rows, 'counts')}"
        f"{_origins(counts)}{folded(f'Sources ({len(sources)})', _sources(sources))}"
    )


def _dropped(dropped: Mapping[str, int], read: int) -> Iterator[tuple[str, ...]]:
    for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
        if count:
            yield _row(count, read, f"dropped: {in_words(reason)}", f"dropped.{reason}")


def _changed(counts: Fields, kept: int) -> Iterator[tuple[str, ...]]:
    for name, count in counts.items():
        if isinstance(count, int) and count and name not in _NOT_SHOWN:
            yield _row(count, kept, in_words(name), name)


def _row(count: int, total: int, meaning: str, name: str) -> tuple[str, ...]:
    share = percent(count / total) if 0 < count <= total else ""
    return f"{count:,}", share, inert_html(meaning), f"<code>{inert_html(name)}</code>"


def _origins(counts: Fields) -> str:
    """Return the first dropped records, without their texts, and details of each reason."""
    examples, details = counts.get("examples") or [], counts.get("details") or {}
    shown = "".join(f"<li><code>{inert_html(str(example))}</code></li>" for example in examples)
    content = (f"<ul>{shown}</ul>" if shown else "") + facts_table(
        (str(reason), str(detail)) for reason, detail in details.items()
    )
    return folded("First dropped records", content)


def _sources(sources: Sequence[Fields]) -> str:
    rows = (
        (
            inert_html(str(source.get("label", ""))),
            f"{source.get('kept', 0):,}",
            f"{source.get('read', 0):,}",
            f"{source.get('pairs', 0):,}",
            f"<code>{inert_html(str(source.get('path', '')))}</code>",
        )
        for source in sources
    )
    return table(("source", "kept", "read", "pairs", "path"), rows)


def _doctor(report: Fields) -> str:
    """Return the findings of the doctor, the most serious first."""
    if not report:
        return ""
    findings: Sequence[Fields] = report.get("findings") or []
    counts = [
        counted(number, level)
        for level in _LEVELS
        if (number := sum(each.get("level") == level for each in findings))
    ]
    head = f"The doctor examined these data: {', '.join(counts) or 'no findings'}."
    shown = "".join(map(_finding, findings[:_MOST_FINDINGS]))
    more = len(findings) - _MOST_FINDINGS
    rest = note(f"{more:,} further findings are in doctor/doctor.html.") if more > 0 else ""
    return f"<h3>Findings of the doctor</h3>{paragraph(head)}{shown}{rest}"


def _finding(finding: Mapping[str, Any]) -> str:
    level = str(finding.get("level"))
    level = level if level in _LEVELS else "note"
    source = finding.get("source")
    origins = joined_origins([str(each) for each in finding.get("examples") or []], _SHOWN_EXAMPLES)
    first = f"<p>First: <code>{inert_html(origins)}</code></p>" if origins else ""
    where = f" <small>{inert_html(str(source))}</small>" if source is not None else ""
    return (
        f'<article class="finding {level}"><span class="badge {level}">{level}</span> '
        f"<b>{escape(str(finding.get('rule')).replace('_', ' '))}</b>{where}"
        f"<p>{inert_html(str(finding.get('text')))}</p>"
        f'<p class="advice"><b>Try</b> {inert_html(str(finding.get("remedy")))}</p>{first}</article>'
    )
