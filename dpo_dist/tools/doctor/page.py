"""Write what the doctor found: doctor.json, a page, and lines for the screen."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dpo_dist
from dpo_dist.data import DataConfig
from dpo_dist.foundation import files
from dpo_dist.foundation.fields import plain
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import aligned, as_yaml, number, pluralize, without_secrets
from dpo_dist.tools.doctor.examine import Diagnosis
from dpo_dist.tools.doctor.extension import DoctorConfig
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.doctor.rules import DOCTOR_RULES
from dpo_dist.tools.findings import Finding, Level
from dpo_dist.tools.pages.charts import histogram
from dpo_dist.tools.pages.render import page

FORMAT = 1
"""Version of the schema of doctor.json, in docs/doctor.md."""

_MOST_ROWS = 12
_FEWEST_GUESSED = 0.55
_SHOWN_EXAMPLES = 3


def write_doctor_report(folder: DoctorFolder, diagnosis: Diagnosis, exit_code: int) -> None:
    """Write doctor.json, without texts of records except single words that reveal a label."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "exit_code": int(exit_code),
        "model": diagnosis.model and str(diagnosis.model),
        "versions": {"dpo_dist": dpo_dist.__version__, "python": platform.python_version()},
        "sources": diagnosis.sources,
        "across": diagnosis.across,
        "findings": list(map(asdict, diagnosis.findings)),
    }
    files.write_json(folder.doctor_report, content)


def write_doctor_page(
    folder: DoctorFolder, diagnosis: Diagnosis, data: DataConfig, doctor: DoctorConfig
) -> None:
    """Write doctor.html."""
    settings = [("model", str(diagnosis.model or "none"))]
    for name, content in (("data", data), ("doctor", doctor)):
        for key, value in vars(content).items():
            settings.append((f"{name}.{key}", str(without_secrets(as_yaml(plain(value))))))
    settings.append(("versions", f"dpo_dist {dpo_dist.__version__}, Python {platform.python_version()}"))
    html = page(
        "doctor.jinja",
        f"Data doctor: {folder.path.resolve().name}",
        badges=counts_by_level(diagnosis.findings) or [("completed", "no findings")],
        findings=diagnosis.findings,
        read=sum(source["read"] for source in diagnosis.sources),
        kept=sum(source["kept"] for source in diagnosis.sources),
        model=diagnosis.model,
        overview=overview(diagnosis.sources),
        sources=list(map(_page_fields, diagnosis.sources)),
        pairs=diagnosis.shown,
        settings=settings,
        max_length=data.max_length,
        picture=histogram,
        leak=DOCTOR_RULES["label_leak"].threshold,
    )
    files.write_text(folder.doctor_page, html)


def counts_by_level(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return each level that has findings, with their number in words, the most serious first."""
    counts = {level: sum(finding.level is level for finding in findings) for level in reversed(Level)}
    return [(level, pluralize(count, level)) for level, count in counts.items() if count]


def overview(sources: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and rows of the table of sources."""
    rows = []
    for source in sources:
        read, kept, held_out = (source[key] for key in ("read", "kept", "held_out"))
        data = "eval" if source["is_eval"] else "train"
        if held_out is not None:
            data = f"{kept - held_out:,} train and {held_out:,} eval"
        row = [source["label"], data, *map(number, (read, kept, read - kept, source["pairs"]))]
        for name in ("chosen", "rejected"):
            side = source["sides"].get(name)
            if not side:
                row.append("-")
                continue
            unit = "tokens" if side["tokens"] else "characters"
            row.append(f"{side[unit]['percentiles'][50]:,.0f} {unit}")
        rows.append(row)
    return ["source", "data", "read", "kept", "dropped", "examples", "chosen", "rejected"], rows


def _page_fields(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source's fields for the page: of its tests for leaks those that matter."""
    return {
        **source,
        "path": without_secrets(source["path"]),
        "leaks": [test for test in source["leaks"] if test["accuracy"] >= _FEWEST_GUESSED][:_MOST_ROWS],
    }


def diagnosis_lines(diagnosis: Diagnosis, folder: DoctorFolder) -> list[str]:
    """Return the report for a screen, each line without control characters."""
    titles, rows = overview(diagnosis.sources)
    lines = [*aligned([titles, *rows], numbers=range(2, len(titles))), ""]
    if diagnosis.model is None:
        lines.append("no model is configured (model.path): texts are examined, tokens are not")
    for finding in diagnosis.findings:
        lines.append(f"{finding.level} {finding.rule} {finding.source or ''}".rstrip())
        lines += [f"  {finding.text}", f"  to do: {finding.remedy}"]
        if finding.examples:
            lines.append(f"  first: {'; '.join(finding.examples[:_SHOWN_EXAMPLES])}")
    counts = ", ".join(count for _, count in counts_by_level(diagnosis.findings))
    return list(map(printable, [*lines, counts or "no findings", f"page: {folder.doctor_page}"]))
