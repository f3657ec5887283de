"""Sections of the doctor's page about each source: counts, lengths, leaks, scores, languages."""

from collections.abc import Mapping, Sequence
from html import escape

from dpo_dist.diagnostics.findings import Distribution, LeakTest, SideReport, SourceReport
from dpo_dist.number_text import number, percent
from dpo_dist.report.blocks import table
from dpo_dist.report.charts.bars import histogram, share_bar
from dpo_dist.report.inert import inert_html, joined_origins
from dpo_dist.secret_text import without_secrets

_MAX_ROWS = 12
_SHOWN_EXAMPLES = 5


def overview(sources: Sequence[SourceReport]) -> str:
    """Return the table of all sources."""
    head = (
        "source",
        "data",
        "read",
        "kept",
        "dropped",
        "examples",
        "chosen",
        "rejected",
        "shared prompts save",
    )
    return table(head, map(_row, sources), "numbers")


def source_section(source: SourceReport, max_length: int) -> str:
    """Return everything about one source."""
    parts = (
        ("Dropped records", _dropped(source)),
        ("Changed by encoding", _counts(source.changed)),
        ("Lengths", _lengths(source, max_length)),
        ("Can the chosen response be guessed from its form?", _leaks(source.leaks)),
        ("Scores", _values(source.scores)),
        ("Margins of the reference model", _values(source.margins)),
        ("Languages of prompts", _shares(source.languages)),
        ("Shares of records", _shares(source.shares)),
        ("Notes", "".join(f"<p>{inert_html(note)}</p>" for note in source.notes)),
    )
    shown = "".join(f"<h3>{title}</h3>{content}" for title, content in parts if content)
    title = f"{inert_html(source.label)} <small>{source.kept:,} of {source.read:,} records kept</small>"
    path = f"<p><code>{inert_html(str(without_secrets(source.path)))}</code></p>"
    return f"<details open><summary>{title}</summary>{path}{shown}</details>"


def _row(source: SourceReport) -> tuple[str, ...]:
    sharing = f"{percent(source.prefix.share)} of tokens" if source.prefix is not None else ""
    return (
        inert_html(source.label),
        "evaluation" if source.is_eval else "<br>".join(source.parts or ["training"]),
        f"{source.read:,}",
        f"{source.kept:,}",
        f"{source.read - source.kept:,}",
        f"{source.pairs:,}",
        *(_median(source.sides.get(side)) for side in ("chosen", "rejected")),
        sharing,
    )


def _median(side: SideReport | None) -> str:
    """Return the median length of a side in its best unit."""
    if side is None:
        return ""
    values, unit = (side.characters, "characters") if side.tokens is None else (side.tokens, "tokens")
    return f"{number(values.percentiles[50], 3)} {unit}"


def _dropped(source: SourceReport) -> str:
    rows = (
        (inert_html(reason), f"{found.count:,}", _origins(found.examples))
        for reason, found in sorted(source.dropped.items(), key=lambda item: -item[1].count)
    )
    return table(("reason", "records", "first ones"), rows)


def _origins(examples: Sequence[str]) -> str:
    return f"<code>{inert_html(joined_origins(examples, _SHOWN_EXAMPLES))}</code>" if examples else ""


def _counts(counts: Mapping[str, int]) -> str:
    rows = ((inert_html(name.replace("_", " ")), f"{count:,}") for name, count in counts.items() if count)
    return table(("change", "records"), rows)


def _lengths(source: SourceReport, max_length: int) -> str:
    figures = []
    for name, side in source.sides.items():
        values, unit = (side.characters, "characters") if side.tokens is None else (side.tokens, "tokens")
        cut = f", <b>{side.cut:,} cut</b> (by {side.cut_tokens:,} tokens)" if side.cut else ""
        picture = histogram(values, f"{name} lengths", max_length if side.tokens is not None else None)
        figures.append(
            f"<figure><figcaption>{escape(name)}, {unit}{cut}</figcaption>{picture}"
            f"<small>{_percentiles(values)}</small></figure>"
        )
    gain = ""
    if source.prefix is not None:
        gain = (
            f"<p>Computing each prompt once saves {percent(source.prefix.share)} of the tokens "
            f"({source.prefix.expected_gain:.2f} times fewer).</p>"
        )
    return f'<div class="figures">{"".join(figures)}</div>{gain}' if figures else ""


def _percentiles(values: Distribution) -> str:
    found = ", ".join(f"{percent} %: {number(value)}" for percent, value in values.percentiles.items())
    return f"mean {number(round(values.mean, 1))}, largest {number(values.largest)}; {found}"


def _leaks(leaks: Sequence[LeakTest]) -> str:
    """Return accuracies on an axis from one half, a guess, to one."""
    rows = (
        (
            inert_html(test.feature.replace("_", " ")),
            percent(test.accuracy),
            share_bar(test.accuracy, percent(test.accuracy), 0.5),
            f"{percent(test.low)} to {percent(test.high)}",
            percent(test.differs),
            inert_html(test.detail),
        )
        for test in leaks[:_MAX_ROWS]
    )
    return table(("feature", "accuracy", "", "interval", "sides differ", "detail"), rows)


def _values(values: Mapping[str, float]) -> str:
    rows = ((inert_html(name.replace("_", " ")), number(value)) for name, value in values.items())
    return table(("statistic", "value"), rows)


def _shares(shares: Mapping[str, float]) -> str:
    rows = (
        (inert_html(name.replace("_", " ")), percent(share), share_bar(share, percent(share)))
        for name, share in sorted(shares.items(), key=lambda item: -item[1])[:_MAX_ROWS]
        if share
    )
    return table(("", "share", ""), rows)
