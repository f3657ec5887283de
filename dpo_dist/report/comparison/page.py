"""`comparison.html`: several models on the same prompts, in one self-contained file below 5 MB."""

from pathlib import Path

from dpo_dist import atomic
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.number_text import counted
from dpo_dist.report.blocks import section
from dpo_dist.report.comparison.findings import headline, warnings
from dpo_dist.report.comparison.pareto import PARETO_STYLE, pareto
from dpo_dist.report.comparison.prompts import PROMPTS_STYLE, SCRIPT, prompts_section
from dpo_dist.report.comparison.results import Results, read_results
from dpo_dist.report.comparison.tables import (
    TABLES_STYLE,
    differences_table,
    models_table,
    style_table,
    win_matrix,
)
from dpo_dist.report.html_page import html_page
from dpo_dist.report.inert import inert_html
from dpo_dist.report.side_by_side import SIDE_STYLE

MOST_BYTES = 5_000_000
_FRAME_BYTES = 60_000

_STYLE = """
:root { --best: #1f6fc4; --better: #d3e8fb; --worse: #fbe0cc; }
@media (prefers-color-scheme: dark) { :root { --best: #7db7f5; --better: #173a5a; --worse: #5a3213; } }
main { max-width: 1560px; }
.headline { font-size: 19px; line-height: 1.4; margin: 12px 0; max-width: 900px; overflow-wrap: anywhere; }
.warnings { margin: 8px 0; padding-left: 20px; max-width: 900px; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 14px; } h1 { font-size: 22px; } }
"""


def write_comparison_page(folder: Path) -> None:
    """Write `comparison.html` from `comparison.json` and `answers.jsonl` in the same folder.

    Args:
        folder: `<run.dir>/comparison`.

    Raises:
        DataError: `comparison.json` cannot be read.
        OSError: a file cannot be read or written.
    """
    names = RunFolder(folder)
    results = read_results(folder / names.comparison_results.name)
    head = [_first_screen(results), *_sections(results)]
    used = sum(len(part.encode("utf-8", "replace")) for part in head)
    prompts = prompts_section(
        folder / names.comparison_answers.name, results, MOST_BYTES - _FRAME_BYTES - used
    )
    style = _STYLE + SIDE_STYLE + TABLES_STYLE + PARETO_STYLE + PROMPTS_STYLE + prompts.style
    page = html_page("Comparison of models", [*head, prompts.html], style, SCRIPT)
    atomic.write_text(folder / names.comparison_page.name, page)


def _first_screen(results: Results) -> str:
    found = warnings(results)
    items = "".join(f"<li>{inert_html(text)}</li>" for text in found)
    judge = "no judge" if results.judge is None else f"judge: {results.judge}"
    about = f"{counted(len(results.models), 'model')}, {counted(results.prompts, 'prompt')}, {judge}"
    return (
        f'<header><h1>Comparison of models</h1></header><p class="quiet">{inert_html(about)}</p>'
        f'<p class="headline">{inert_html(headline(results))}</p>'
        + (f'<ul class="warnings">{items}</ul>' if found else "")
    )


def _sections(results: Results) -> list[str]:
    measure = "score" if results.has_scores else f"win rate over {inert_html(results.base)}"
    picture = pareto(results)
    note = (
        f"<p>Bars: 95 % intervals over prompts. Dashed: the frontier, the best {measure} within a KL. "
        "Hollow: by the means, another model reaches at least this with less KL; "
        "the table of differences has the intervals.</p>"
    )
    matrix = win_matrix(results)
    return [
        section("models", "Models", models_table(results) + _kl_note(results)),
        section("kl", "KL and quality", f'<div class="wide">{picture}</div>{note}' if picture else ""),
        section("wins", "Win rates", matrix + _verdicts(results) if matrix else ""),
        section("differences", "Differences", differences_table(results)),
        section("style", "Style", style_table(results)),
    ]


def _kl_note(results: Results) -> str:
    if results.temperature in (None, 1.0):
        return ""
    return (
        f"<p>Sampled at a temperature of {results.temperature:g}: the KL is that of likelier responses. "
        "Only at 1 it has no bias.</p>"
    )


def _verdicts(results: Results) -> str:
    """Return how responses were judged: positions, and counts of the judge."""
    text = (
        "The judge compared every two responses in both positions; a verdict that changes with the position "
        "is a tie."
        if results.compares
        else "The judge gave every response a score, so no positions are swapped: the higher score wins."
    )
    counts = "; ".join(f"{name.replace('_', ' ')}: {number:,}" for name, number in results.notes.items())
    return f"<p>{text}{f' Counts: {inert_html(counts)}.' if counts else ''}</p>"
