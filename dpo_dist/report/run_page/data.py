"""Section about the data: counts of records in words, and the doctor's findings."""

from collections.abc import Iterator, Mapping, Sequence

from dpo_dist.data.count_words import in_words
from dpo_dist.number_text import counted, percent
from dpo_dist.report.blocks import facts_table, folded, note, paragraph, section, table
from dpo_dist.report.inert import inert_html, joined_origins
from dpo_dist.report.run_page.facts import Fields, PageFacts

_PARTS = {"train": "Training data", "eval": "Evaluation data"}
_NOT_SHOWN = frozenset({"read", "kept", "pairs"})
_MOST_FINDINGS = 8
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
        f"<h3>{title}</h3>{paragraph(head)}{table(('records', 'meaning'), rows, 'counts')}"
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
    share = f" ({percent(count / total)})" if 0 < count <= total else ""
    return f"{count:,}{share}", f"{inert_html(meaning)} <small><code>{inert_html(name)}</code></small>"


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
    """Return the findings of the doctor, the most serious first; those that ask for nothing are folded."""
    if not report:
        return ""
    findings: Sequence[Fields] = report.get("findings") or []
    by_level = {level: [each for each in findings if each.get("level") == level] for level in _LEVELS}
    counts = [counted(len(found), level) for level, found in by_level.items() if found]
    head = f"The doctor examined these data: {', '.join(counts) or 'no findings'}."
    *serious, notes = (
        "".join(_rule(level, found) for found in _by_rule(by_level[level])) for level in _LEVELS
    )
    return (
        f"<h3>Findings of the doctor</h3>{paragraph(head)}{''.join(serious)}"
        f"{folded(f'Notes ({len(by_level[_LEVELS[-1]])})', notes)}"
    )


def _by_rule(findings: Sequence[Fields]) -> list[list[Fields]]:
    rules: dict[str, list[Fields]] = {}
    for finding in findings:
        rules.setdefault(str(finding.get("rule")), []).append(finding)
    return list(rules.values())


def _rule(level: str, findings: Sequence[Fields]) -> str:
    """Return the findings of one rule, with the remedy of the first one."""
    shown = "".join(f"<li>{_finding(finding)}</li>" for finding in findings[:_MOST_FINDINGS])
    more = len(findings) - _MOST_FINDINGS
    rest = note(f"{more:,} further ones are in doctor/doctor.html.") if more > 0 else ""
    rule, remedy = str(findings[0].get("rule")).replace("_", " "), str(findings[0].get("remedy"))
    return (
        f'<article class="finding"><span class="badge {level}">{level}</span> <b>{inert_html(rule)}</b>'
        f"<ul>{shown}</ul>{rest}"
        f'<div class="advice"><b>Try</b> {inert_html(remedy)}</div></article>'
    )


def _finding(finding: Fields) -> str:
    source = finding.get("source")
    where = f"{inert_html(str(source))}: " if source is not None else ""
    origins = joined_origins([str(each) for each in finding.get("examples") or []], _SHOWN_EXAMPLES)
    first = f"<br><small>First: <code>{inert_html(origins)}</code></small>" if origins else ""
    return f"{where}{inert_html(str(finding.get('text')))}{first}"
