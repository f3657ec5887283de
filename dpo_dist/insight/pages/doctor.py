"""The doctor's report: its page, and doctor.json."""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from markupsafe import Markup

import dpo_dist
from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation import files
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import plain as finite
from dpo_dist.foundation.text import counted, number, percent, without_secrets
from dpo_dist.insight.doctor.examine import Diagnosis
from dpo_dist.insight.doctor.findings import Across, Distribution, Finding, Level, SideReport, SourceReport
from dpo_dist.insight.pages.render import page
from dpo_dist.insight.pages.svg import histogram

FORMAT = 1
"""Version of the schema of doctor.json, in docs/doctor.md."""

_MOST_ROWS = 12
_FEWEST_GUESSED = 0.55
_LABELLED = (50, 95, 25)


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
    html = page(
        "doctor.jinja",
        f"Data doctor: {folder.path.resolve().name}",
        badges=counts_by_level(report.findings) or [("completed", "no findings")],
        report=report,
        kept=sum(source.kept for source in report.sources),
        model=diagnosis.model,
        overview=_overview(report.sources),
        sources=[_source(source) for source in report.sources],
        store=diagnosis.store,
        across=_across(report.across),
        pairs=diagnosis.shown,
        settings=list(_settings(config, diagnosis)),
        max_length=config.data.max_length,
        picture=_picture,
    )
    files.write_text(folder.doctor_page, html)


def counts_by_level(findings: tuple[Finding, ...]) -> list[tuple[str, str]]:
    """Return each level that has findings with their number in words, the most serious first."""
    counts = {level: sum(finding.level is level for finding in findings) for level in reversed(Level)}
    return [(level, counted(count, level)) for level, count in counts.items() if count]


def median_length(side: SideReport | None) -> str:
    """Return the median length of a side in its best unit; "" without the side."""
    if side is None:
        return ""
    values, unit = (side.characters, "characters") if side.tokens is None else (side.tokens, "tokens")
    return f"{values.percentiles[50]:,.0f} {unit}"


def _overview(sources: tuple[SourceReport, ...]) -> tuple[list[str], list[list[str]]]:
    """Return the table of all sources."""
    head = ["source", "data", "read", "kept", "dropped", "examples", "chosen", "rejected"]
    rows = [
        [
            source.label,
            "evaluation" if source.is_eval else ", ".join(source.parts or ["training"]),
            *map(number, (source.read, source.kept, source.read - source.kept, source.pairs)),
            *(median_length(source.sides.get(side)) for side in ("chosen", "rejected")),
        ]
        for source in sources
    ]
    if any(source.prefix for source in sources):
        head.append("shared prompts save")
        for row, source in zip(rows, sources, strict=True):
            row.append(f"{percent(source.prefix.share)} of tokens" if source.prefix else "")
    return head, rows


def _source(source: SourceReport) -> Mapping[str, Any]:
    """Return a source as its section shows it: what says something, the largest first."""
    leaks = [test for test in source.leaks if test.accuracy >= _FEWEST_GUESSED and not source.is_eval]
    return vars(source) | {
        "path": without_secrets(source.path),
        "dropped": dict(sorted(source.dropped.items(), key=lambda item: -item[1].count)),
        "changed": _values({name: count for name, count in source.changed.items() if count}),
        "leaks": leaks[:_MOST_ROWS],
        "scores": _values(source.scores),
        "margins": _values(source.margins),
        "languages": _shares(source.languages),
        "shares": _shares(source.shares),
    }


def _values(values: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), number(value)) for name, value in values.items()]


def _shares(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return shares without those of no record and of all, the largest first."""
    found = sorted(shares.items(), key=lambda item: -item[1])
    return [(name, share) for name, share in found if 0 < share < 1][:_MOST_ROWS]


def _picture(values: Distribution, title: str, limit: float | None) -> Markup:
    """Return a histogram with labels at the smallest, the largest and some values between."""
    between = (values.percentiles[each] for each in _LABELLED if each in values.percentiles)
    return histogram(values.edges, values.counts, (values.smallest, values.largest, *between), title, limit)


def _across(across: Across) -> list[tuple[str, str]]:
    rows = {
        "equal to an earlier record": across.duplicates,
        "equal or nearly equal to an earlier record": across.near_duplicates,
        "state the opposite preference of another record": across.contradictions,
        "have a prompt that occurred before": across.repeated_prompts,
        "of evaluation, with a prompt of the training data": across.leaked_prompts,
        "of evaluation, with nearly a prompt of the training data": across.near_leaked_prompts,
        "overlap with a benchmark prompt": across.benchmark_hits,
    }
    return [(name, number(count)) for name, count in rows.items()]


def _settings(config: RunConfig, diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "model", str(diagnosis.model or "none")
    for name, content in (("data", config.data), ("doctor", config.doctor)):
        for field in fields(content):
            value = plain(getattr(content, field.name))
            yield f"{name}.{field.name}", str(without_secrets(str(value)))
    yield "versions", f"dpo_dist {dpo_dist.__version__}, Python {platform.python_version()}"
