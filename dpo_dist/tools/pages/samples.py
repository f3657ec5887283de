"""Show prompts with responses side by side and mark different words; choose the samples for a page."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dpo_dist.config.run_folder import checkpoint_step
from dpo_dist.foundation.files import read_lines
from dpo_dist.foundation.text import number, percent, pluralize
from dpo_dist.kit import RunFolder
from dpo_dist.tools.pages.render import part
from dpo_dist.tools.pages.thumbnails import ThumbnailRoom, Thumbnails
from dpo_dist.tools.text_facts import WORD, text_facts

_Row = Mapping[str, Any]
MarkedPiece = tuple[str, bool]
"""A part of a text, and whether its words differ from another text's."""

_LONGEST_TEXT = 6000
_OPEN = 2
_TITLE_CHARACTERS = 120
_TEMPLATE_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")
_ROLE = re.compile(r"\A\s*(system|user|assistant|model)\s*(\n|\Z)")


@dataclass(frozen=True)
class ShownResponse:
    """A response: the model's label, the text (None: not known), notes after the label, marked pieces."""

    label: str
    text: str | None
    notes: str = ""
    pieces: Sequence[MarkedPiece] = ()


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt as the model reads it, with responses that are compared with the one labelled `against`.

    `why` is shown small after the title, `labels` are for filters, the smallest `order` comes first, `images`
    are the prompt's.
    """

    prompt: str
    responses: Sequence[ShownResponse]
    against: str
    why: str
    labels: Sequence[str] = ()
    order: float = 0.0
    images: Thumbnails = ()

    @property
    def title(self) -> str:
        """The beginning of the last turn on one line, without the template's tokens."""
        turns = [_ROLE.sub("", turn).split() for turn in _TEMPLATE_TOKEN.split(self.prompt)]
        line = " ".join(next(filter(None, reversed(turns)), ()))
        return line if len(line) <= _TITLE_CHARACTERS else line[:_TITLE_CHARACTERS] + "\u2026"


def mark_differences(text: str, other: str) -> tuple[list[MarkedPiece], float]:
    """Return the pieces of a text and the share of its words that `other` lacks, white space aside.

    Letters of scripts without spaces are words. In a long text frequent words do not anchor the comparison.
    """
    words = list(WORD.finditer(text))
    matcher = SequenceMatcher(None, [word.group() for word in words], WORD.findall(other))
    pieces: list[MarkedPiece] = []
    new = end = 0
    for kind, start, stop, _, _ in matcher.get_opcodes():
        if start < stop:
            begin = words[start].start()
            before = end
            end = words[stop - 1].end()
            new += (stop - start) * (kind != "equal")
            pieces += [(text[before:begin], False), (text[begin:end], kind != "equal")]
    pieces.append((text[end:], False))
    return [piece for piece in pieces if piece[0]], new / len(words) if words else 0.0


def prompt_items(prompts: Iterable[ShownPrompt], room: int) -> tuple[list[Markup], int]:
    """Return prompts as HTML while they fit into `room` bytes, and the number of prompts left out.

    Thumbnails have their own room.
    """
    items: list[Markup] = []
    left = room
    waiting = iter(prompts)
    images = ThumbnailRoom()
    for prompt in waiting:
        thumbnails = images.fitting(prompt.images)
        item = part("macros.jinja", "prompt", _cut(replace(prompt, images=thumbnails)), len(items) < _OPEN)
        left -= len(item.encode("utf-8", "replace")) - sum(len(image or "") for image in thumbnails)
        if left < 0:
            return items, 1 + sum(1 for _ in waiting)
        items.append(item)
    return items, 0


def _cut(prompt: ShownPrompt) -> Mapping[str, Any]:
    """Return a prompt's fields for the template, with long texts cut."""
    base = next((each for each in prompt.responses if each.label == prompt.against), None)
    base_text = base.text or "" if base else ""
    other = base_text[:_LONGEST_TEXT] if base_text.strip() else None
    columns = [_column(each, None if each is base else other, prompt.against) for each in prompt.responses]
    text = prompt.prompt[:_LONGEST_TEXT]
    return {**vars(prompt), "title": prompt.title, "prompt": text, "responses": columns}


def _column(response: ShownResponse, other: str | None, against: str) -> ShownResponse:
    text = (response.text or "")[:_LONGEST_TEXT]
    if not text.strip():
        return response
    notes = [response.notes]
    pieces = [(text, False)]
    if other is not None:
        pieces, share = mark_differences(text, other)
        differs = f"{percent(share)} of its words not in {against}"
        notes.append(f"the same text as {against}" if text == other else differs)
    if len(response.text or "") > _LONGEST_TEXT:
        notes.append(f"first {_LONGEST_TEXT:,} of {len(response.text or ''):,} characters")
    return ShownResponse(response.label, text, "; ".join(filter(None, notes)), pieces)


def end_notes(tokens: int | None, is_finished: bool | None) -> str:
    """Return "184 tokens, did not end"; an argument that is None is left out."""
    notes = []
    if tokens is not None:
        notes.append(pluralize(tokens, "token"))
    if is_finished is False:
        notes.append("did not end")
    return ", ".join(notes)


REPEATED = 0.5
DISTINCT = 0.5
LONGER = 2.0
_MOST_ROWS = 200
_MOST_WORST = 6
_MOST_SHOWN = 10
_MEASURED_CHARACTERS = 2000
_SECTION_BYTES = 900_000


def faults(row: _Row) -> list[str]:
    """Return the reasons to look at a policy's response; the first is the worst."""
    text = row["policy"]
    tokens = row["policy_tokens"]
    reference_tokens = row["reference_tokens"]
    facts = text_facts(text[:_MEASURED_CHARACTERS], tokens or 0, is_finished=True)
    ratio = tokens / reference_tokens if tokens and reference_tokens else 1.0
    reasons = {
        "is empty": facts.empty,
        "does not end": row["policy_finished"] is False,
        "repeats itself": facts.longest_repeat > REPEATED or (facts.distinct_3 or 1.0) < DISTINCT,
        f"is {ratio:.1f} times as long as the reference's": ratio >= LONGER,
    }
    return [reason for reason, applies in reasons.items() if applies]


def choose(rows: Sequence[_Row]) -> list[tuple[_Row, str]]:
    """Return rows to show, each with the reason: those with most faults, and some at random."""
    with_faults = [(row, faults(row)) for row in rows]
    faulty = [each for each in with_faults if each[1]]
    worst = sorted(faulty, key=lambda each: (-len(each[1]), -(each[0]["policy_tokens"] or 0)))[:_MOST_WORST]
    others = [row for row, reasons in with_faults if (row, reasons) not in worst]
    sample = random.Random(0).sample(others, min(len(others), _MOST_SHOWN - len(worst)))  # noqa: S311
    choice = [(row, f"the response {', '.join(reasons)}") for row, reasons in worst]
    return [*choice, *((row, "chosen at random") for row in sample)]


def samples_section(folder: RunFolder) -> Mapping[str, Any]:
    """Return the content of a page's section about a run's samples; empty without samples.

    It has responses of the reference, and of the policy at the last, the previous and the first evaluation.
    """
    files = _files(folder)
    steps = list(files)
    rows_of_steps = dict[int, list[_Row]]()
    for step in dict.fromkeys((*steps[:2], *steps[-1:])):
        rows_of_steps[step] = list(islice(read_lines(files[step]), _MOST_ROWS))
    last = rows_of_steps[steps[0]] if steps else []
    if not last:
        return {}
    by_prompt = {step: {row["prompt_id"]: row for row in rows} for step, rows in rows_of_steps.items()}
    prompts = []
    for row, reason in choose(last):
        of_prompt = {step: by_id.get(row["prompt_id"]) for step, by_id in by_prompt.items()}
        title = f"{row['source']}: {reason}"
        responses = tuple(_responses(row, of_prompt))
        prompts.append(
            ShownPrompt(row["prompt"], responses, "reference", title, images=row.get("images", ()))
        )
    items, omitted = prompt_items(prompts, _SECTION_BYTES)
    return {
        "step": steps[0],
        "prompts": len(last),
        "file": files[steps[0]].name,
        "items": items,
        "omitted": omitted,
    }


def _files(folder: RunFolder) -> dict[int, Path]:
    """Return the sample files by step, the newest first."""
    files = {}
    for file in folder.samples.glob("step-*.jsonl"):
        step = checkpoint_step(file.stem)
        if step is not None:
            files[step] = file
    return dict(sorted(files.items(), reverse=True))


def samples_side_by_side(runs: Mapping[str, RunFolder]) -> list[Markup]:
    """Return prompts that several runs share, with each run's response after its last step."""
    responses_of_prompts: dict[str, list[ShownResponse]] = {}
    last: dict[str, _Row] = {}
    for label, folder in runs.items():
        for file in islice(_files(folder).values(), 1):
            for row in islice(read_lines(file), _MOST_ROWS):
                notes = end_notes(row["policy_tokens"], row["policy_finished"])
                response = ShownResponse(label, row["policy"], f"step {row['step']:,}, {notes}")
                responses_of_prompts.setdefault(row["prompt_id"], []).append(response)
                last[row["prompt_id"]] = row
    prompts = []
    for key, responses in responses_of_prompts.items():
        if len(responses) > 1:
            newest = last[key]
            against = responses[0].label
            responses.append(response_in_data(newest))
            images = newest.get("images", ())
            prompts.append(ShownPrompt(newest["prompt"], responses, against, newest["source"], images=images))
    return prompt_items(prompts[:_MOST_SHOWN], _SECTION_BYTES)[0]


def worst_pairs(file: Path) -> list[Markup]:
    """Return the pairs in an evaluation's file of worst pairs, as HTML."""
    prompts = []
    for row in read_lines(file):
        margin = row["margin"]
        metric = f"margin {number(margin, 3)}"
        responses = [ShownResponse(side, row[side]) for side in ("chosen", "rejected") if side in row]
        if "rejected" not in row:
            responses = [ShownResponse("good", row["chosen"])]
            metric = f"reward {number(margin, 3)}"
        elif "chosen" not in row:
            responses = [ShownResponse("bad", row["rejected"])]
            metric = f"reward {number(-margin, 3)}"
        why = f"{row['origin']}: {metric}"
        images = row.get("images", ())
        prompts.append(ShownPrompt(row["prompt"], responses, "chosen", why, images=images))
    return prompt_items(prompts, _SECTION_BYTES)[0]


def _responses(last: _Row, rows: Mapping[int, _Row | None]) -> Iterator[ShownResponse]:
    """Yield the reference's response, the policy's last one, earlier ones that differ, and the chosen one."""
    notes = end_notes(last["reference_tokens"], last["reference_finished"])
    yield ShownResponse("reference", last["reference"], notes)
    texts = {last["reference"]}
    for step, row in rows.items():
        if row is last or (row is not None and row["policy"] not in texts):
            texts.add(row["policy"])
            notes = end_notes(row["policy_tokens"], row["policy_finished"])
            yield ShownResponse(f"step {step:,}", row["policy"], notes)
    yield response_in_data(last)


def response_in_data(row: _Row, place: str = "") -> ShownResponse:
    """Return the response in the data, named "chosen", or by its label if it has one."""
    name = f"{row['label']} response" if row.get("label") else "chosen"
    return ShownResponse(name + place, row["chosen"])
