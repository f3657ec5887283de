"""The page about two runs: verdicts, settings that differ, results, curves, time and responses of both."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dpo_dist import atomic
from dpo_dist.config.keys import all_keys
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.errors import ConfigError
from dpo_dist.report.blocks import flat, folded, made, note, section, table, text
from dpo_dist.report.charts.curves import comparison_charts
from dpo_dist.report.charts.script import SCRIPT, STYLE
from dpo_dist.report.html_page import html_page
from dpo_dist.report.inert import inert_html
from dpo_dist.report.run_page.difference_results import LABELS, Two, results_section
from dpo_dist.report.run_page.difference_samples import samples_of_both
from dpo_dist.report.run_page.difference_time import time_section
from dpo_dist.report.run_page.facts import PageFacts, read_facts
from dpo_dist.report.run_page.samples import SAMPLES_STYLE
from dpo_dist.report.run_page.style import PAGE_STYLE
from dpo_dist.report.run_page.verdict import verdict_section

_NAME_BYTES = 80
_ABSENT = "not recorded"
_SETTINGS = "Settings that define the result and differ. All others that were recorded are equal."
_SAME_SETTINGS = "All settings that define the result are equal."
_CURVES = (
    "Both runs in each chart: light lines are logged values, bold ones their moving mean, rings evaluations."
)

_STYLE = """
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 0 24px; }
.two > div { min-width: 0; }
.name { border-bottom: 3px solid currentColor; padding-bottom: 2px; overflow-wrap: anywhere; }
.name b { color: CanvasText; }
.verdict { margin-top: 10px; }
.results td:first-child { min-width: 116px; }
@media (max-width: 600px) { .results td, .results th { padding-right: 8px; } }
"""


def write_difference(
    folders: tuple[RunFolder, RunFolder],
    price_per_gpu_hour: float | None = None,
    output: Path | None = None,
) -> Path:
    """Write the page about two runs, and return its path.

    Parts whose file is missing or damaged are omitted, with a warning if it is damaged.

    Args:
        folders: run directories, which may still be written by training.
        price_per_gpu_hour: in place of `tracking.price_per_gpu_hour` of both runs.
        output: the page; None: `difference-A-B.html` in the working folder, with the names of the runs.

    Raises:
        ConfigError: both are the same run directory.
    """
    if folders[0].path.resolve() == folders[1].path.resolve():
        raise ConfigError(
            "both are the same run directory",
            where=str(folders[0].path.resolve()),
            remedy="name two runs, or one for its own page",
        )
    first, second = (read_facts(folder, price_per_gpu_hour) for folder in folders)
    two = Two((first, second), names_of(folders))
    makers: tuple[Callable[[Two], str], ...] = (
        _header,
        _verdicts,
        _settings,
        results_section,
        _curves,
        time_section,
        samples_of_both,
        _environment,
    )
    sections = [made(make, two, "comparison") for make in makers]
    title = " and ".join(two.names)
    path = output or Path("-".join(["difference", *map(_in_file_name, two.names)]) + ".html")
    atomic.write_text(path, html_page(title, sections, PAGE_STYLE + SAMPLES_STYLE + STYLE + _STYLE, SCRIPT))
    return path


def names_of(folders: Sequence[RunFolder]) -> tuple[str, str]:
    """Return the names of two run directories, with as many parent folders as distinguish them."""
    parts = [folder.path.resolve().parts for folder in folders]
    count = 1
    while parts[0][-count:] == parts[1][-count:] and count < max(map(len, parts)):
        count += 1
    first, second = ("/".join(each[-count:]) for each in parts)
    return first, second


def _in_file_name(name: str) -> str:
    return name.replace("/", "-").encode()[-_NAME_BYTES:].decode(errors="ignore")


def _header(two: Two) -> str:
    return f"<header><h1>{' and '.join(map(inert_html, two.names))}</h1></header>"


def _verdicts(two: Two) -> str:
    """Return outcome and verdict of both runs side by side."""
    columns = ""
    for label, name, color, facts in zip(LABELS, two.names, ("c0", "c1"), two.facts, strict=True):
        outcome = text(facts.summary["exit"]) if facts.summary.get("exit") else "not ended"
        judged = verdict_section(facts).replace(' id="verdict"', "")
        columns += (
            f'<div><h3 class="name {color}"><b>{label}: {inert_html(name)}</b></h3>'
            f'<span class="badge {inert_html(outcome)}">{inert_html(outcome)}</span>{judged}</div>'
        )
    return f'<section id="verdicts"><div class="two">{columns}</div></section>'


def _settings(two: Two) -> str:
    """Return the keys of the configuration whose values differ; those without effect on the result folded."""
    first, second = (_values(facts) for facts in two.facts)
    if not first or not second:
        return ""
    defining = {name for name, key in all_keys().items() if key.defines_result}
    differing, head = list(_differing(first, second)), ("setting", *LABELS)
    shown = table(head, (row for row in differing if row[0] in defining), "settings")
    others = table(head, (row for row in differing if row[0] not in defining), "settings")
    return section(
        "settings",
        "Settings",
        note(_SETTINGS if shown else _SAME_SETTINGS),
        shown,
        folded("Other settings that differ", others),
    )


def _values(facts: PageFacts) -> dict[str, str]:
    """Return the settings of a run as text, by `section.key`."""
    return {
        f"{name}.{key}": text(value)
        for name, fields in facts.config.items()
        if isinstance(fields, dict)
        for key, value in fields.items()
    }


def _curves(two: Two) -> str:
    first, second = two.facts
    shown = comparison_charts(dict(zip(LABELS, (first.run.rows, second.run.rows), strict=True)))
    return section("curves", "Curves", note(_CURVES), shown) if shown else ""


def _environment(two: Two) -> str:
    """Return versions and hardware that differ, folded."""
    first, second = (dict(flat(facts.environment)) for facts in two.facts)
    return folded("Environment that differs", table(("", *LABELS), _differing(first, second), "settings"))


def _differing(first: dict[str, str], second: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield the keys with different values, as cells of a table."""
    for key in dict.fromkeys([*first, *second]):
        values = first.get(key, _ABSENT), second.get(key, _ABSENT)
        if values[0] != values[1]:
            yield inert_html(key), inert_html(values[0]), inert_html(values[1])
