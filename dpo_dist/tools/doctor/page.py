"""Write what the doctor found: doctor.json, a page, and lines for the screen."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dpo_dist
from dpo_dist.foundation import files
from dpo_dist.foundation.streams import printable
from dpo_dist.foundation.text import aligned, number, pluralize, without_secrets
from dpo_dist.tools.doctor.examine import Diagnosis
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.findings import Finding, Level, finding_block
from dpo_dist.tools.pages.blocks import Heading, PageBlock, Table, Text, titled_section
from dpo_dist.tools.pages.render import page

FORMAT = 1
"""Version of the schema of doctor.json, in docs/output.schema.json."""

_SHOWN_EXAMPLES = 3  # on a screen
_NO_MODEL = "No model is configured (model.path): texts were examined, tokens were not."
_CAUTION = "Texts of the data can be offensive or private. They are hidden until you open them."
_KEY = "Green: counted by the loss. Violet: a special token. Red: cut by data.max_length. Others: context."


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


def write_doctor_page(folder: DoctorFolder, diagnosis: Diagnosis) -> None:
    """Write doctor.html."""
    read = sum(source["read"] for source in diagnosis.sources)
    kept = sum(source["kept"] for source in diagnosis.sources)
    blocks: list[PageBlock] = [Text(f"{number(kept)} of {pluralize(read, 'record')} can be used.")]
    if not diagnosis.model:
        blocks.append(Text(_NO_MODEL))
    findings = [finding_block(without_secrets(asdict(finding))) for finding in diagnosis.findings]
    blocks += [Heading("Findings"), *(findings or [Text("None.")])]
    blocks += [Heading("Sources"), Table(*overview(diagnosis.sources))]
    for source in diagnosis.sources:
        blocks += _source(without_secrets(source))
    if diagnosis.shown:
        texts: list[PageBlock] = [Text(_CAUTION, "warning"), Text(_KEY, "note"), *diagnosis.shown]
        blocks += titled_section("Examples of findings, decoded", texts)
    badges = counts_by_level(diagnosis.findings) or [("good", "no findings")]
    html = page(f"Data doctor: {folder.path.resolve().name}", blocks, badges)
    files.write_text(folder.doctor_page, html)


def _source(source: Mapping[str, Any]) -> Iterator[PageBlock]:
    """Yield what was found in a source."""
    kept = f"{number(source['kept'])} of {pluralize(source['read'], 'record')} kept"
    yield Text(without_secrets(source["path"]), title=f"{source['label']}: {kept}")
    if source["dropped"]:
        rows = []
        for reason, found in source["dropped"].items():
            rows.append([f"dropped: {reason}", number(found["count"]), "; ".join(found["examples"][:5])])
        yield Table(["reason", "records", "first ones"], rows)
    if source["changed"]:
        yield _numbers("changed by encoding", source["changed"])
    lengths = []
    titles: list[str] = []
    for name, side in source["sides"].items():
        unit = "tokens" if side["tokens"] else "characters"
        values = side[unit]
        percentiles = values["percentiles"]
        titles = ["length", "mean", *(f"{share} %" for share in percentiles), "largest", "cut"]
        cut = f"{number(side['cut'])}\n{number(side['cut_tokens'])} tokens" if side["cut"] else ""
        numbers = [values["mean"], *percentiles.values(), values["largest"]]
        lengths.append([f"{name}\n{unit}", *map(number, numbers), cut])
    yield Table(titles, lengths)


def _numbers(title: str, fields: Mapping[str, float]) -> Table:
    return Table([title, ""], [[name.replace("_", " "), number(value)] for name, value in fields.items()])


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
