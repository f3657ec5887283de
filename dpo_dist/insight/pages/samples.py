"""Section of a run's page about samples: some prompts with the responses of the reference and the policy."""

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.text import counted, percent
from dpo_dist.generation.text_facts import WORD, is_refusal, language_of, text_facts
from dpo_dist.insight.pages.render import html_bytes, inert_html, json_rows, section, table, text_of
from dpo_dist.insight.pages.side_by_side import (
    LONGEST,
    SIDE_STYLE,
    Response,
    cut,
    difference,
    end_notes,
    prompt_title,
    side_by_side,
)
from dpo_dist.insight.pages.svg import evenly

LONGER, SHORTER, REPEATED, DISTINCT = 2.0, 0.5, 0.5, 0.5

# A part is enough for these facts, and a long response costs no more.
_MEASURED_CHARACTERS = 2000

FAULTS: Mapping[str, tuple[str, str]] = {
    "empty": ("is empty", "are empty"),
    "unfinished": ("does not end", "do not end"),
    "repeats": ("repeats itself", "repeat themselves"),
    "refuses": ("refuses where the reference does not", "refuse where the reference does not"),
    "language": (
        "is in another language than the chosen response",
        "are in another language than the chosen response",
    ),
    "longer": (
        "is at least twice as long as the reference's",
        "are at least twice as long as the reference's",
    ),
    "shorter": ("is at most half as long as the reference's", "are at most half as long as the reference's"),
}
"""Faults of a response, for one and for several; the worst first."""


@dataclass(frozen=True)
class Judged:
    """Facts of a policy's response to a prompt that decide whether it is shown.

    Attributes:
        prompt_id: of the prompt.
        faults: keys of `FAULTS` with their extent: the larger, the worse.
        change: share of its first words, and of those of the reference's response, that they do not share;
            None: the reference's response is not known.
        is_same: whether all words of both responses are the same.
    """

    prompt_id: str
    faults: Mapping[str, float]
    change: float | None
    is_same: bool


def judged(row: Mapping[str, Any]) -> Judged:
    """Return the facts of a row of a file of samples; fields of another type are not known."""
    policy, reference = _text(row.get("policy")) or "", _text(row.get("reference"))
    tokens, reference_tokens = _count(row.get("policy_tokens")), _count(row.get("reference_tokens"))
    faults: dict[str, float] = {}
    if not policy.strip():
        faults["empty"] = 1
    if row.get("policy_finished") is False:
        faults["unfinished"] = tokens or 1
    facts = text_facts(policy, 0, is_finished=True)
    if facts.longest_repeat > REPEATED or (facts.distinct_3 is not None and facts.distinct_3 < DISTINCT):
        faults["repeats"] = facts.longest_repeat + 1 - (facts.distinct_3 or 0)
    if facts.is_refusal and (reference is None or not is_refusal(reference)):
        faults["refuses"] = 1
    expected = language_of(_text(row.get("chosen")) or "")
    if None not in (facts.language, expected) and facts.language != expected:
        faults["language"] = 1
    if tokens and reference_tokens and policy.strip():
        ratio = tokens / reference_tokens
        if ratio >= LONGER:
            faults["longer"] = ratio
        elif ratio <= SHORTER:
            faults["shorter"] = 1 / ratio
    change = None if reference is None else 1 - difference(policy, reference).similarity
    responses = (row.get(name) for name in ("policy", "reference"))
    words = [WORD.findall(text) if isinstance(text, str) else None for text in responses]
    return Judged(str(row.get("prompt_id")), faults, change, None not in words and words[0] == words[1])


def choose(rows: Sequence[Judged], most: int) -> dict[str, list[str]]:
    """Return the ids of at most `most` prompts with the reasons why each is shown, in the order to show them.

    The worst response of each fault, those that changed most and least, and one of the median change; then
    the second worst of each fault, and so on. Equal ones are ordered by id.
    """
    ranked = [_worst_first(rows, fault) for fault in FAULTS]
    extremes = _extremes(rows)
    worst = [row for column in ranked for row in column[:1]]
    others = [row for at in range(1, most) for column in ranked for row in column[at : at + 1]]
    by_id = {row.prompt_id: row for row in [*worst, *(row for row, _ in extremes), *others]}
    return {
        name: [
            *(each for fault, (each, _) in FAULTS.items() if fault in row.faults),
            *(reason for each, reason in extremes if each is row),
        ]
        for name, row in list(by_id.items())[:most]
    }


def _worst_first(rows: Sequence[Judged], fault: str) -> list[Judged]:
    found = (row for row in rows if fault in row.faults)
    return sorted(found, key=lambda row: (-row.faults[fault], row.prompt_id))


def _extremes(rows: Sequence[Judged]) -> list[tuple[Judged, str]]:
    """Return the rows that changed most, by the median, and least, with their reasons."""
    ranked = sorted(
        (row for row in rows if row.change is not None), key=lambda row: (-(row.change or 0), row.prompt_id)
    )
    if not ranked:
        return []
    found = [(ranked[0], "differs most from the reference's")]
    if len(ranked) > 2:
        found.append((ranked[len(ranked) // 2], "differs from the reference's by the median"))
    if len(ranked) > 1:
        found.append((ranked[-1], "differs least from the reference's"))
    return found


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 < value < 10**9 else None


def _text(value: object) -> str | None:
    return value[:_MEASURED_CHARACTERS] if isinstance(value, str) else None


Row = Mapping[str, Any]

_MOST_SHOWN = 10
_MOST_ROWS = 200
_MOST_BYTES = 128 * 2**20
_MOST_STEPS = 8
_OPEN = 2
# The last is for texts that hardly fit: every character can need 70 bytes of HTML.
_LONGEST_TEXTS = (6000, 400)
_SECTION_BYTES = 900_000

_log = logging.getLogger(__name__)

_COLUMNS = {
    "eval_samples/length": "tokens",
    "eval_samples/finished": "ended",
    "eval_samples/distinct_3": "distinct 3-grams",
    "eval_samples/longest_repeat": "longest repeat",
    "eval_samples/language_changed": "language changed",
    "eval_samples/refusals": "refusals",
    "eval_samples/empty": "empty",
}


def samples_section(folder: RunFolder, metrics: Sequence[Mapping[str, float]]) -> str:
    """Return the section about the samples of a run, below 1 MB; empty without samples.

    Pages with it add `SAMPLES_STYLE` to their style sheet.

    Args:
        folder: the run directory.
        metrics: metrics rows of the run.
    """
    files = sample_files(folder)
    step, damaged = 0, 0
    rows: list[Judged] = []
    for step in sorted(files, reverse=True):
        rows, damaged = _judged(files[step])
        if rows:
            break
    if not rows:
        return ""
    chosen = choose(rows, _MOST_SHOWN)
    found = _shown_rows(files, step, chosen)
    steps = list(found)
    items: list[str] = []
    for prompt_id, reasons in chosen.items():
        room = _SECTION_BYTES - sum(map(html_bytes, items))
        item = _item(prompt_id, reasons, steps, found, room, is_open=len(items) < _OPEN)
        items += [item] if item else []
    return section(
        "samples",
        "Samples",
        f"<p>{_sentence(step, rows)}</p>{_metrics(metrics)}",
        f'<p class="explained">{_note(len(items), len(chosen), len(rows), damaged, files[step])}</p>',
        *items,
    )


def sample_files(folder: RunFolder) -> dict[int, Path]:
    """Return the files of samples by step, the first step first."""
    names = (
        (re.fullmatch(r"step-(\d{1,18})", file.stem), file) for file in folder.samples.glob("step-*.jsonl")
    )
    return dict(sorted((int(name[1]), file) for name, file in names if name))


def _judged(file: Path) -> tuple[list[Judged], int]:
    """Return the facts of the first rows of a file, and the number of damaged lines among them."""
    rows, damaged = [], 0
    for row in sample_rows(file):
        if row is None or not isinstance(row.get("policy"), str):
            damaged += 1
        else:
            rows.append(judged(row))
    return rows, damaged


def sample_rows(file: Path) -> Iterator[Row | None]:
    """Yield the first rows of a file, None for a damaged one; a file that cannot be read ends them."""
    try:
        yield from islice(json_rows(file, _MOST_BYTES), _MOST_ROWS)
    except OSError as error:
        _log.warning("%s cannot be read and is omitted from the report: %s", file, error)


def _rows_of(file: Path, prompt_ids: Collection[str]) -> dict[str, Row]:
    """Return the rows of some prompts by id."""
    rows = filter(None, sample_rows(file))
    return {name: row for row in rows if (name := str(row.get("prompt_id"))) in prompt_ids}


def _shown_rows(
    files: Mapping[int, Path], last: int, prompt_ids: Collection[str]
) -> dict[int, dict[str, Row]]:
    """Return the rows of the last step, the one before it and the first, by step.

    Step 0 is not shown beside others if its responses are the reference's.
    """
    earlier = [step for step in files if step < last]
    start = _rows_of(files[0], prompt_ids) if 0 in earlier else {}
    if all(row.get("policy") == row.get("reference") for row in start.values()):
        earlier = [step for step in earlier if step > 0]
    steps = dict.fromkeys([last, *earlier[-1:], *earlier[:1]])
    return {step: start if step == 0 else _rows_of(files[step], prompt_ids) for step in steps}


def _item(
    prompt_id: str,
    reasons: Sequence[str],
    steps: Sequence[int],
    found: Mapping[int, Mapping[str, Row]],
    room: int,
    *,
    is_open: bool,
) -> str:
    """Return a prompt with its responses, folded; empty if it needs more than `room` bytes."""
    last = found[steps[0]].get(prompt_id, {})
    prompt, source = text_of(last, "prompt") or "", text_of(last, "source") or "source not known"
    responses = [
        Response("reference", text_of(last, "reference"), model_notes(last, "reference")),
        *_policies(prompt_id, steps, found),
        Response("chosen", text_of(last, "chosen")),
    ]
    why = inert_html(f"{cut(source)}: the response after step {steps[0]:,} {', '.join(reasons)}")
    for longest in _LONGEST_TEXTS:
        texts = side_by_side(prompt, responses, "reference", longest)
        item = (
            f'<details class="sample"{" open" if is_open else ""}><summary dir="auto">{prompt_title(prompt)} '
            f"<small>{why}</small></summary>{texts}</details>"
        )
        if html_bytes(item) <= room:
            return item
    return ""


def model_notes(row: Row, model: str) -> str:
    """Return the notes on the response of "policy" or "reference" in a row."""
    return end_notes(row.get(f"{model}_tokens"), row.get(f"{model}_finished"))


def _policies(
    prompt_id: str, steps: Sequence[int], found: Mapping[int, Mapping[str, Row]]
) -> Iterator[Response]:
    """Yield the policy's responses; the notes of the last one compare it with the one before it."""
    rows = [found[step].get(prompt_id, {}) for step in steps]
    texts = [text_of(row, "policy") for row in rows]
    for at, (step, row) in enumerate(zip(steps, rows, strict=True)):
        notes = [model_notes(row, "policy")]
        if at == 0 and len(steps) > 1 and texts[0] and texts[1]:
            notes.append(_since(texts[0], texts[1], steps[1]))
        yield Response(f"step {step}", texts[at], "; ".join(filter(None, notes)))


def _since(text: str, before: str, step: int) -> str:
    if text == before:
        return f"unchanged since step {step}"
    similarity = difference(text[:LONGEST], before[:LONGEST]).similarity
    return f"{percent(1 - similarity)} changed since step {step}"


def _sentence(step: int, rows: Sequence[Judged]) -> str:
    """Return the number of responses with each fault."""
    counts = Counter(fault for row in rows for fault in row.faults)
    phrases = [
        f"{counts[fault]:,} {one if counts[fault] == 1 else many}"
        for fault, (one, many) in FAULTS.items()
        if counts[fault]
    ]
    same = sum(row.is_same for row in rows)
    phrases += (
        [f"{same:,} {'has' if same == 1 else 'have'} the same words as the reference's"] if same else []
    )
    found = (
        "; ".join(phrases)
        or "none is empty, unfinished, repetitive, a refusal, in another language or of another length"
    )
    return f"Responses of the policy after step {step:,} to {counted(len(rows), 'held-out prompt')}: {found}."


def _note(shown: int, chosen: int, rows: int, damaged: int, file: Path) -> str:
    """Return the limits of the choice: its size, rows that are not considered, not readable or too large."""
    parts = [
        f"{shown:,} of them {'is' if shown == 1 else 'are'} below, by faults and by change against the "
        f"reference; all are in samples/{inert_html(file.name)}. Marked words are not in the reference's "
        "response. Texts of data and models can be offensive or private."
    ]
    if rows + damaged >= _MOST_ROWS:
        parts.append(f"Only the first {counted(_MOST_ROWS, 'row')} of the file are considered.")
    if damaged:
        parts.append(f"{counted(damaged, 'line')} of the file cannot be read.")
    if shown < chosen:
        parts.append(f"{counted(chosen - shown, 'prompt')} more would make this page too large.")
    return " ".join(parts)


def _metrics(metrics: Sequence[Mapping[str, float]]) -> str:
    """Return a table of the metrics of samples over some steps, the first and last among them."""
    rows = [row for row in metrics if any(key in row for key in _COLUMNS)]
    keys = [key for key in _COLUMNS if any(key in row for row in rows)]
    lines = [["reference", *(_cell(_of_reference(key), rows[-1]) for key in keys)]] if rows else []
    lines += [
        [f"{row['step']:,.0f}", *(_cell(key, row) for key in keys)] for row in evenly(rows, _MOST_STEPS)
    ]
    return table(("step", *(_COLUMNS[key] for key in keys)), [line for line in lines if any(line[1:])])


def _of_reference(key: str) -> str:
    return key.replace("/", "/reference_")


def _cell(key: str, row: Mapping[str, float]) -> str:
    value = row.get(key, math.nan)
    if not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if key.endswith("length") else percent(value)


SAMPLES_STYLE = (
    SIDE_STYLE
    + """
.sample .side { margin-bottom: 8px; }
"""
)
