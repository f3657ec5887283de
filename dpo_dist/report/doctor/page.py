"""`doctor.html` and `doctor.json`: the doctor's findings about the data of a run.

The page is one file without scripts; it loads nothing, and texts of the data in it are inert.
"""

import json
import os
import platform
from dataclasses import fields
from html import escape
from typing import Any

import dpo_dist
from dpo_dist import atomic
from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.diagnostics.diagnosis import Diagnosis
from dpo_dist.diagnostics.findings import Across, Finding, Level
from dpo_dist.diagnostics.stored_margins import StoreUse
from dpo_dist.errors import ConfigError
from dpo_dist.json_values import plain as finite
from dpo_dist.number_text import number
from dpo_dist.report.blocks import section, table
from dpo_dist.report.charts.bars import histogram
from dpo_dist.report.doctor.sources import overview, source_section
from dpo_dist.report.doctor.style import DOCTOR_STYLE
from dpo_dist.report.doctor.texts import pairs_section
from dpo_dist.report.html_page import html_page
from dpo_dist.report.inert import inert_html, joined_origins
from dpo_dist.secret_text import without_secrets

FORMAT = 1
"""Version of the schema of doctor.json, in docs/doctor.md."""

_SHOWN_EXAMPLES = 5


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
    atomic.write_text(folder.doctor_report, json.dumps(finite(content), indent=1, ensure_ascii=True) + "\n")


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
    atomic.write_text(folder.doctor_page, html_page(title, sections, DOCTOR_STYLE))


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
