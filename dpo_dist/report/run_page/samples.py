"""Section of a run's page about samples: some prompts with the responses of the reference and the policy."""

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.number_text import counted, percent
from dpo_dist.report.blocks import section, table
from dpo_dist.report.charts.smoothing import evenly
from dpo_dist.report.html_page import html_bytes
from dpo_dist.report.inert import inert_html
from dpo_dist.report.json_rows import json_rows, text_of
from dpo_dist.report.run_page.sample_choice import FAULTS, Judged, choose, judged
from dpo_dist.report.side_by_side import (
    LONGEST,
    SIDE_STYLE,
    Response,
    cut,
    end_notes,
    prompt_title,
    side_by_side,
)
from dpo_dist.report.word_diff import difference

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
