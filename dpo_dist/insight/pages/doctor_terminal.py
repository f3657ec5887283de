"""Print the doctor's report: a table of sources, findings by severity, and the address of the page."""

import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console as Screen
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.streams import SafeStream, printable
from dpo_dist.insight.doctor.examine import Diagnosis
from dpo_dist.insight.doctor.findings import Finding, Level, SourceReport
from dpo_dist.insight.pages.doctor import counts_by_level, median_length
from dpo_dist.insight.pages.render import joined_origins

_COLOURS = {Level.error: "bold red", Level.warning: "yellow", Level.note: "blue"}
_SHOWN_EXAMPLES = 3
_MIN_WIDTH_OF_TABLE = 72
_FILE_WIDTH = 110
"""Characters of a line if the output is no terminal."""


def print_diagnosis(diagnosis: Diagnosis, folder: RunFolder, screen: Screen | None = None) -> None:
    """Print a summary on `screen` (default: standard output); plain text where that is no terminal."""
    screen = screen or Screen(file=SafeStream(sys.stdout), highlight=False, soft_wrap=False)  # type: ignore[arg-type]
    if not screen.is_terminal:
        screen.width = _FILE_WIDTH
    for part in _parts(diagnosis, screen.width):
        screen.print(part)
    # On one line, whatever its length: it can be copied.
    screen.print(Text(f"page: {folder.doctor_page}"), soft_wrap=True)


def _parts(diagnosis: Diagnosis, width: int) -> Iterator[RenderableType]:
    report = diagnosis.report
    yield _table(report.sources) if width >= _MIN_WIDTH_OF_TABLE else Group(*map(_lines, report.sources))
    if diagnosis.model is None:
        yield Text("without a model (model.path): only texts are examined, not tokens")
    if diagnosis.store is not None:
        yield Text(printable(diagnosis.store.sentence))
    for finding in report.findings:
        yield _finding(finding)
    yield Text(", ".join(count for _, count in counts_by_level(report.findings)) or "no findings")


def _table(sources: tuple[SourceReport, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("source", overflow="fold")
    table.add_column("data")
    for title in ("read", "kept", "dropped", "examples", "chosen", "rejected"):
        table.add_column(title, justify="right")
    for source in sources:
        table.add_row(*map(Text, _cells(source)))
    return table


def _cells(source: SourceReport) -> list[str]:
    counts = (source.read, source.kept, source.read - source.kept, source.pairs)
    return [
        printable(source.label),
        "eval" if source.is_eval else " and ".join(source.parts or ["train"]),
        *(f"{count:,}" for count in counts),
        *(median_length(source.sides.get(side)) or "-" for side in ("chosen", "rejected")),
    ]


def _lines(source: SourceReport) -> Text:
    label, data, read, kept, dropped, *_ = _cells(source)
    return Text(f"{label} ({data})\n  {read} read, {kept} kept, {dropped} dropped")


def _finding(finding: Finding) -> Group:
    source = f" {printable(finding.source)}" if finding.source is not None else ""
    title = Text.assemble((f"{finding.level}", _COLOURS[finding.level]), f" {finding.rule}{source}")
    lines = [Text(printable(finding.text)), Text(f"to do: {printable(finding.remedy)}")]
    if finding.examples:
        origins = joined_origins(finding.examples, _SHOWN_EXAMPLES)
        lines.append(Text(f"first: {printable(origins)}", style="dim"))
    return Group(title, *(Padding(line, (0, 0, 0, 2), expand=False) for line in lines))
