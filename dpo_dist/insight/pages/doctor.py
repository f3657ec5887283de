"""The doctor's report: its page, its summary on the screen, and doctor.json."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console as Screen
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import dpo_dist
from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation import files
from dpo_dist.foundation.streams import SafeStream, printable
from dpo_dist.foundation.text import counted, number, percent, without_secrets
from dpo_dist.insight.doctor.examine import Diagnosis
from dpo_dist.insight.doctor.findings import Finding, Level
from dpo_dist.insight.pages.charts import histogram
from dpo_dist.insight.pages.render import joined_origins, page

FORMAT = 1
"""Version of the schema of doctor.json, in docs/doctor.md."""

_MOST_ROWS = 12
_FEWEST_GUESSED = 0.55
_COLOURS = {Level.error: "bold red", Level.warning: "yellow", Level.note: "blue"}
_SHOWN_EXAMPLES = 3
_MIN_WIDTH_OF_TABLE = 72
_FILE_WIDTH = 110
"""Characters of a line if the output is no terminal."""
_ACROSS = {
    "duplicates": "equal to an earlier record",
    "near_duplicates": "equal or nearly equal to an earlier record",
    "contradictions": "state the opposite preference of another record",
    "repeated_prompts": "have a prompt that occurred before",
    "leaked_prompts": "of evaluation, with a prompt of the training data",
    "near_leaked_prompts": "of evaluation, with nearly a prompt of the training data",
    "benchmark_hits": "overlap with a benchmark prompt",
}


def write_doctor_report(folder: RunFolder, diagnosis: Diagnosis, exit_code: int) -> None:
    """Write doctor.json; it has no texts of records, except single words that reveal a label."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "exit_code": int(exit_code),
        "model": str(diagnosis.model) if diagnosis.model is not None else None,
        "versions": {"dpo_dist": dpo_dist.__version__, "python": platform.python_version()},
        "store": diagnosis.store,
        "sources": diagnosis.sources,
        "across": diagnosis.across,
        "findings": list(map(asdict, diagnosis.findings)),
    }
    text = json.dumps(files.plain(content), indent=1, ensure_ascii=True)
    files.write_text(folder.doctor_report, text + "\n")


def write_doctor_page(folder: RunFolder, diagnosis: Diagnosis, config: RunConfig) -> None:
    """Write doctor.html."""
    settings = [("model", str(diagnosis.model or "none"))]
    for name, content in (("data", config.data), ("doctor", config.doctor)):
        for key, value in vars(content).items():
            settings.append((f"{name}.{key}", str(without_secrets(str(plain(value))))))
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
        sources=list(map(_shown, diagnosis.sources)),
        store=diagnosis.store,
        store_sentence=diagnosis.store and store_sentence(diagnosis.store),
        across=[(name, number(diagnosis.across[key])) for key, name in _ACROSS.items()],
        pairs=diagnosis.shown,
        settings=settings,
        max_length=config.data.max_length,
        picture=histogram,
    )
    files.write_text(folder.doctor_page, html)


def store_sentence(use: Mapping[str, Any]) -> str:
    """Return the use of the reference store in one line."""
    if not use["stored"]:
        return (
            f"reference: no log-probs of these pairs in {use['folder']}; after dpo_dist.precompute with "
            "this configuration, the doctor finds pairs that are likely mislabelled"
        )
    numerics = "; ".join(use["numerics"])
    return f"reference: {use['stored']:,} of {use['pairs']:,} pairs in the store ({numerics})"


def counts_by_level(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return each level that has findings with their number in words, the most serious first."""
    counts = {level: sum(finding.level is level for finding in findings) for level in reversed(Level)}
    return [(level, counted(count, level)) for level, count in counts.items() if count]


def overview(sources: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table of all sources."""
    rows = []
    for source in sources:
        read, kept, held_out, prefix = (source[key] for key in ("read", "kept", "held_out", "prefix"))
        data = "eval" if source["is_eval"] else "train"
        data = data if held_out is None else f"{kept - held_out:,} train and {held_out:,} eval"
        numbers = map(number, (read, kept, read - kept, source["pairs"]))
        lengths = (_median(source["sides"].get(side)) for side in ("chosen", "rejected"))
        saved = f"{percent(prefix['share'])} of tokens" if prefix else ""
        rows.append([source["label"], data, *numbers, *lengths, saved])
    return [
        "source",
        "data",
        "read",
        "kept",
        "dropped",
        "examples",
        "chosen",
        "rejected",
        "prompts save",
    ], rows


def _median(side: Mapping[str, Any] | None) -> str:
    """Return the median length of a side in its best unit; "-" without the side."""
    if side is None:
        return "-"
    values, unit = (side["tokens"], "tokens") if side["tokens"] else (side["characters"], "characters")
    return f"{values['percentiles'][50]:,.0f} {unit}"


def _shown(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source as its section shows it: what says something, the largest first."""
    return {
        **source,
        "path": without_secrets(source["path"]),
        "changed": _values(source["changed"]),
        "leaks": [test for test in source["leaks"] if test["accuracy"] >= _FEWEST_GUESSED][:_MOST_ROWS],
        "scores": _values(source["scores"]),
        "margins": _values(source["margins"]),
        "languages": _shares(source["languages"]),
        "shares": _shares(source["shares"]),
    }


def _values(values: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), number(value)) for name, value in values.items()]


def _shares(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return shares without those of no record and of all, the largest first."""
    found = sorted(shares.items(), key=lambda item: -item[1])
    return [(name, share) for name, share in found if 0 < share < 1][:_MOST_ROWS]


def print_diagnosis(diagnosis: Diagnosis, folder: RunFolder, screen: Screen | None = None) -> None:
    """Print a summary on `screen` (default: standard output); plain text where that is no terminal."""
    screen = screen or Screen(file=SafeStream(sys.stdout), highlight=False, soft_wrap=False)  # type: ignore[arg-type]
    if not screen.is_terminal:
        screen.width = _FILE_WIDTH
    screen.print(_table(*overview(diagnosis.sources), screen.width))
    if diagnosis.model is None:
        screen.print(Text("without a model (model.path): only texts are examined, not tokens"))
    if diagnosis.store is not None:
        screen.print(Text(printable(store_sentence(diagnosis.store))))
    for finding in diagnosis.findings:
        screen.print(_finding(finding))
    screen.print(Text(", ".join(count for _, count in counts_by_level(diagnosis.findings)) or "no findings"))
    # On one line, whatever its length: it can be copied.
    screen.print(Text(f"page: {folder.doctor_page}"), soft_wrap=True)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    if width < _MIN_WIDTH_OF_TABLE:
        return Group(
            *(
                Text(f"{printable(label)} ({data})\n  {read} read, {kept} kept, {dropped} dropped")
                for label, data, read, kept, dropped, *_ in rows
            )
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles[:-1]:
        is_name = title in ("source", "data")
        table.add_column(title, justify="left" if is_name else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row[:-1]))
    return table


def _finding(finding: Finding) -> Group:
    source = f" {printable(finding.source)}" if finding.source is not None else ""
    title = Text.assemble((f"{finding.level}", _COLOURS[finding.level]), f" {finding.rule}{source}")
    lines = [Text(printable(finding.text)), Text(f"to do: {printable(finding.remedy)}")]
    if finding.examples:
        origins = joined_origins(finding.examples, _SHOWN_EXAMPLES)
        lines.append(Text(f"first: {printable(origins)}", style="dim"))
    return Group(title, *(Padding(line, (0, 0, 0, 2), expand=False) for line in lines))
