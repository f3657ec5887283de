"""Prompts of a comparison with the models' responses side by side, and a filter that needs no script."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.number_text import counted, number
from dpo_dist.report.comparison.results import Results, finite, response_of
from dpo_dist.report.comparison.verdicts import Places, all_labels, order_style, verdict_labels
from dpo_dist.report.html_page import html_bytes
from dpo_dist.report.inert import inert_html
from dpo_dist.report.json_rows import Row, json_rows, text_of
from dpo_dist.report.side_by_side import Response, cut, end_notes, prompt_title, side_by_side

_LONGEST_TEXTS = (6000, 3000, 1500)
# Of a prompt that alone would need much of the page: a character can need 70 bytes of HTML.
_SHORT_TEXT, _MUCH = 200, 0.05
# HTML per byte of text: marks of words that differ. HTML of a prompt without its texts.
_GROWTH, _ITEM_BYTES = 1.6, 2000
_MOST_SOURCES, _MOST_RANGES = 8, 40

_UNFINISHED, _EMPTY = "a response does not end", "a response is empty"

PROMPTS_STYLE = """
.switch { position: absolute; opacity: 0; width: 1px; height: 1px; }
.filters { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0; }
.filters label, .filters input { border: 1px solid var(--line); border-radius: 6px; padding: 3px 12px; }
.filters label { cursor: pointer; font-size: 13px; background: var(--tile); overflow-wrap: anywhere; }
.filters input { font: inherit; font-size: 14px; flex: 1 1 220px; min-width: 0; max-width: 420px; }
[hidden] { display: none !important; }
.quiet { color: var(--quiet); font-size: 13px; }
"""

SCRIPT = """
const search = document.getElementById("search"), found = document.getElementById("found");
if (search) {
  const items = [...document.querySelectorAll(".prompt")];
  const texts = new Map();
  const update = () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      if (words.length && !texts.has(item)) texts.set(item, item.textContent.toLowerCase());
      item.hidden = !words.every((word) => texts.get(item).includes(word));
      if (getComputedStyle(item).display !== "none") shown += 1;
    }
    found.textContent = shown + " of " + items.length + " prompts";
  };
  search.hidden = found.hidden = false;
  search.addEventListener("input", update);
  for (const input of document.querySelectorAll("input.switch")) input.addEventListener("change", update);
  update();
}
"""


@dataclass(frozen=True)
class Section:
    """The section and the style sheet of its filters."""

    html: str
    style: str


@dataclass(frozen=True)
class _Survey:
    """The rows of the file before any is shown.

    Attributes:
        labels: of filters.
        longest: characters that a text may have.
        rows: their number.
        ranks: by line, classes of the places by differences of scores.
    """

    labels: Sequence[str]
    longest: int
    rows: int
    ranks: Mapping[int, Sequence[str]]


def prompts_section(file: Path, results: Results, room: int) -> Section:
    """Return the prompts of `answers.jsonl` in at most about `room` bytes of HTML.

    Prompts without room are omitted, and the section says which.

    Raises:
        OSError: the file cannot be read.
    """
    survey = _survey(file, results, room)
    items: list[str] = []
    counts = Counter[str]()
    omitted: list[int] = []
    damaged, used = 0, 0
    for line, row in enumerate(json_rows(file), start=1):
        if row is None or not isinstance(row.get("responses"), dict):
            damaged += 1
            continue
        labels = [label for label in _labels(row, results) if label in survey.labels]
        kinds = [*(f"f{survey.labels.index(label)}" for label in labels), *survey.ranks.get(line, ())]
        item = _item(row, kinds, survey, results, room - used, room)
        if not item:
            omitted.append(line)
            continue
        counts.update(labels)
        items.append(item)
        used += html_bytes(item)
    notes = _notes(omitted, damaged, survey)
    if not items:
        return Section(f"<section><h2>Responses</h2>{notes}</section>" if notes else "", "")
    switches, buttons, style = _filters(survey.labels, counts, len(items))
    style += order_style(survey.labels, survey.ranks.values(), results)
    html = (
        f'<section><h2>Responses</h2><p class="quiet">Marked words are not in the response of '
        f"{inert_html(results.base)}. Texts of data and models can be offensive or private.</p>{notes}"
        f'{switches}{buttons}<div class="prompts">{"".join(items)}</div></section>'
    )
    return Section(html, style)


def _survey(file: Path, results: Results, room: int) -> _Survey:
    labels, sources = Counter[str](), Counter[str]()
    sizes = dict.fromkeys(_LONGEST_TEXTS, 0.0)
    rows = 0
    places = Places(results)
    for line, row in enumerate(json_rows(file), start=1):
        if row is None or not isinstance(row.get("responses"), dict):
            continue
        rows += 1
        source, *others = _labels(row, results)
        sources[source] += 1
        labels.update(others)
        places.add(line, row)
        texts = [text_of(row, "prompt"), text_of(row, "chosen")]
        texts += [text_of(response_of(row, model.name), "text") for model in results.models]
        for longest in sizes:
            sizes[longest] += _ITEM_BYTES + _GROWTH * sum(
                html_bytes((text or "")[:longest]) for text in texts
            )
    longest = next((each for each in _LONGEST_TEXTS if sizes[each] <= room), _LONGEST_TEXTS[-1])
    shown = [label for label, _ in sources.most_common(_MOST_SOURCES)] if len(sources) > 1 else []
    shown += [label for label in (_UNFINISHED, _EMPTY, *all_labels(results)) if labels[label]]
    return _Survey(shown, longest, rows, places.classes())


def _labels(row: Row, results: Results) -> Iterator[str]:
    """Yield the labels of the filters that show this prompt, that of its source first."""
    yield f"source {cut(text_of(row, 'source') or 'not known')}"
    responses = [response_of(row, model.name) for model in results.models]
    if any(each.get("finished") is False for each in responses):
        yield _UNFINISHED
    if any(not (text_of(each, "text") or "").strip() for each in responses):
        yield _EMPTY
    yield from verdict_labels(row, results)


def _item(row: Row, kinds: Sequence[str], survey: _Survey, results: Results, left: int, room: int) -> str:
    """Return a prompt with its responses, folded; empty without room."""
    if left < _ITEM_BYTES:
        return ""
    prompt = text_of(row, "prompt") or ""
    head = f'<details class="prompt {" ".join(kinds)}"><summary dir="auto">{prompt_title(prompt)}'
    small = f" <small>{inert_html('; '.join(_labels(row, results)))}</small></summary>"
    responses = list(_responses(row, results))
    item = f"{head}{small}{side_by_side(prompt, responses, results.base, survey.longest)}</details>"
    if html_bytes(item) > _MUCH * room:
        item = f"{head}{small}{side_by_side(prompt, responses, results.base, _SHORT_TEXT)}</details>"
    return item if html_bytes(item) <= left else ""


def _responses(row: Row, results: Results) -> Iterator[Response]:
    for model in results.models:
        response = response_of(row, model.name)
        notes = [end_notes(response.get("tokens"), response.get("finished"))]
        score, logp, base = (finite(response.get(name)) for name in ("score", "logp", "base_logp"))
        if score is not None:
            notes.append(f"score {number(score)}")
        if logp is not None and base is not None and model.name != results.base:
            notes.append(f"log-ratio {number(logp - base)} nats")
        yield Response(model.name, text_of(response, "text"), "; ".join(filter(None, notes)))
    if isinstance(row.get("chosen"), str):
        yield Response("chosen in the data", row["chosen"])


def _filters(labels: Sequence[str], counts: Mapping[str, int], items: int) -> tuple[str, str, str]:
    """Return the switches, their buttons and the style sheet that makes them work without script."""
    shown = [("all", f"all ({items:,})")]
    shown += [(f"f{at}", f"{label} ({counts[label]:,})") for at, label in enumerate(labels) if counts[label]]
    switches, buttons, style = [], [], []
    for name, text in shown:
        is_on = " checked" if name == "all" else ""
        switches.append(f'<input type="radio" class="switch" name="filter" id="filter-{name}"{is_on}>')
        buttons.append(f'<label for="filter-{name}">{inert_html(text)}</label>')
        button = f"~ .filters label[for=filter-{name}]"
        style.append(f"#filter-{name}:checked {button} {{ border-color: var(--best); font-weight: 600; }}")
        style.append(f"#filter-{name}:focus-visible {button} {{ outline: 2px solid var(--best); }}")
        if name != "all":
            style.append(f"#filter-{name}:checked ~ .prompts > :not(.{name}) {{ display: none; }}")
    search = '<input type="search" id="search" placeholder="words of a prompt or response" hidden '
    search += 'aria-label="words of a prompt or response"><span id="found" class="quiet" hidden></span>'
    return "".join(switches), f'<div class="filters">{"".join(buttons)}{search}</div>', "\n".join(style)


def _notes(omitted: Sequence[int], damaged: int, survey: _Survey) -> str:
    notes = []
    if omitted:
        notes.append(
            f"{len(omitted):,} of {counted(survey.rows, 'prompt')} are not on this page, which would be too "
            f"large: {_ranges(omitted)} of answers.jsonl."
        )
    if damaged:
        notes.append(f"{counted(damaged, 'line')} of answers.jsonl cannot be read.")
    return f"<p>{' '.join(notes)}</p>" if notes else ""


def _ranges(lines: Sequence[int]) -> str:
    """Return "lines 3, 5 to 9"; of many ranges the first ones."""
    ranges: list[list[int]] = []
    for line in lines:
        if ranges and ranges[-1][1] == line - 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    texts = [
        f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in ranges[:_MOST_RANGES]
    ]
    texts += ["and others"] if len(ranges) > _MOST_RANGES else []
    return f"{'line' if len(lines) == 1 else 'lines'} {', '.join(texts)}"
