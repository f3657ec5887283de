"""`report.html`: one self-contained page about a run, made from the files of its directory only.

It loads nothing from other addresses, is complete without its script, and every text in it is inert.
"""

import re
from collections.abc import Callable
from pathlib import Path

from dpo_dist import atomic
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.report.blocks import made, note, section
from dpo_dist.report.charts.curves import charts
from dpo_dist.report.charts.script import SCRIPT, STYLE
from dpo_dist.report.html_page import html_page
from dpo_dist.report.run_page.accuracy import accuracy_section
from dpo_dist.report.run_page.data import data_section
from dpo_dist.report.run_page.displacement import displacement_section
from dpo_dist.report.run_page.facts import PageFacts, read_facts
from dpo_dist.report.run_page.reference import reference_section
from dpo_dist.report.run_page.repeat import files_section, repeat_section, settings_sections
from dpo_dist.report.run_page.samples import SAMPLES_STYLE, samples_section
from dpo_dist.report.run_page.speed import speed_section
from dpo_dist.report.run_page.style import PAGE_STYLE
from dpo_dist.report.run_page.verdict import header, tiles, verdict_section

Maker = Callable[[PageFacts], str]

_HEADING = re.compile(r'<section id="(\w+)"[^>]*><h2>([^<]*)</h2>')
_CURVES = (
    "Light lines: means of the steps between two metrics rows; bold lines: their moving mean; rings: "
    "evaluations. Hours are those of optimizer steps."
)


def write_page(
    folder: RunFolder, price_per_gpu_hour: float | None = None, output: Path | None = None
) -> Path:
    """Write the report page of a run directory, and return its path.

    Sections whose file is missing are omitted; those whose file cannot be read, or has other content than
    this program writes, too, with a warning.

    Args:
        folder: the run directory.
        price_per_gpu_hour: in place of `tracking.price_per_gpu_hour` of the run.
        output: the page, in place of `report.html` in the run directory.
    """
    facts = read_facts(folder, price_per_gpu_hour)
    main: tuple[Maker, ...] = (header, verdict_section, tiles)
    details: tuple[Maker, ...] = (
        _samples,
        _curves,
        accuracy_section,
        displacement_section,
        data_section,
        speed_section,
        reference_section,
        repeat_section,
        files_section,
        settings_sections,
    )
    first, later = ([made(make, facts, "report") for make in makers] for makers in (main, details))
    style, script = PAGE_STYLE + SAMPLES_STYLE + STYLE, SCRIPT if facts.run.rows else ""
    page = html_page(folder.path.resolve().name, [*first, _contents(later), *later], style, script)
    path = output or folder.report
    atomic.write_text(path, page)
    return path


def _contents(sections: list[str]) -> str:
    """Return links to the sections."""
    found = [link for part in sections for link in _HEADING.findall(part)]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in found)
    return f"<nav>{links}</nav>" if len(found) > 1 else ""


def _samples(facts: PageFacts) -> str:
    return samples_section(facts.folder, facts.run.rows)


def _curves(facts: PageFacts) -> str:
    shown = charts(facts.run.rows)
    return section("curves", "Curves", note(_CURVES), shown) if shown else ""
