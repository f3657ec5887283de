"""Decoded records on the doctor's page: trained and special tokens are marked, texts hidden until clicked."""

from collections.abc import Sequence
from html import escape

from dpo_dist.diagnostics.shown_pairs import Kind, Part, Segment, ShownPair
from dpo_dist.report.inert import inert_html

_LEGEND = (
    '<p class="legend"><span class="trained">counted by the loss</span> <span>context</span> '
    '<span class="special">special token</span> <span class="cut">cut by data.max_length</span> '
    '<i class="mark">U+200B</i> invisible character</p>'
)


def pairs_section(pairs: Sequence[ShownPair]) -> str:
    """Return the records of the page, grouped by source; empty without any."""
    if not pairs:
        return ""
    shown = "".join(_pair(number, pair) for number, pair in enumerate(pairs))
    # Inputs and labels open the texts without a script.
    return (
        '<section id="pairs"><h2>Records, decoded</h2>'
        '<p class="warning">Texts of the data can be offensive or private. They are hidden until you open '
        "them; doctor.texts=false makes a page without texts.</p>"
        '<input type="checkbox" id="all-texts" class="switch"><label for="all-texts" class="button">'
        f'Show all {len(pairs)} texts</label>{_LEGEND}<div class="pairs">{shown}</div></section>'
    )


def _pair(number: int, pair: ShownPair) -> str:
    rules = "".join(f'<span class="badge">{inert_html(rule)}</span>' for rule in pair.rules)
    note = f'<span class="badge error">dropped: {inert_html(pair.note)}</span>' if pair.note else ""
    return (
        f'<article><div class="head"><code>{inert_html(pair.origin)}</code>{rules}{note}</div>'
        f'<input type="checkbox" id="text-{number}" class="switch">'
        f'<label for="text-{number}" class="button">Show texts</label>'
        f'<div class="texts">{"".join(map(_part, pair.parts))}</div></article>'
    )


def _part(part: Part) -> str:
    facts = [part.name]
    facts += [f"{part.tokens:,} tokens"] if part.tokens is not None else []
    facts += [f"score {part.score:g}"] if part.score is not None else []
    body = "".join(map(_segment, part.segments))
    return f'<h4>{escape(", ".join(facts))}</h4><div class="text" dir="auto">{body}</div>'


def _segment(segment: Segment) -> str:
    if segment.kind is Kind.omitted:
        return f'<span class="omitted">{escape(segment.text)} not shown</span>'
    names = {
        "special": segment.kind is Kind.special,
        "trained": segment.is_trained,
        "cut": segment.is_cut,
    }
    classes = " ".join(name for name, applies in names.items() if applies)
    return f'<span class="{classes}">{inert_html(segment.text)}</span>'
