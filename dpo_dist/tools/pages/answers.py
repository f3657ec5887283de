"""Show answers: prompts with the responses of models side by side, and different words marked.

A row of answers is a line of `samples/step-*.jsonl` or `comparison/answers.jsonl`: `prompt`, `responses` by
name, the first one the base, and perhaps `chosen` with its `label`, and `images`. A response has `text` and
perhaps `tokens`, `finished`, `score`, `logp` and `base_logp`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup

from dpo_dist.foundation.text import number, percent, pluralize
from dpo_dist.tools.pages.render import part
from dpo_dist.tools.pages.thumbnails import ThumbnailRoom, Thumbnails
from dpo_dist.tools.text_facts import WORD

Answers = Mapping[str, Any]
MarkedPiece = tuple[str, bool]
"""A part of a text, and whether its words differ from another text's."""

_LONGEST_TEXT = 6000
_OPEN = 2
_TITLE_CHARACTERS = 120
_TEMPLATE_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")
_ROLE = re.compile(r"\A\s*(system|user|assistant|model)\s*(\n|\Z)")


def prompt_items(prompts: Iterable[tuple[Answers, Sequence[str]]], room: int) -> tuple[list[Markup], int]:
    """Return prompts as HTML while they fit into `room` bytes, and the number of prompts left out.

    A row of answers comes with its labels, which are shown after its title. Thumbnails have their own room.
    """
    items: list[Markup] = []
    left = room
    waiting = iter(prompts)
    images = ThumbnailRoom()
    for row, labels in waiting:
        thumbnails = images.fitting(row.get("images", ()))
        item = part("macros.jinja", "prompt", _shown(row, labels, thumbnails), len(items) < _OPEN)
        left -= len(item.encode("utf-8", "replace")) - sum(len(image or "") for image in thumbnails)
        if left < 0:
            return items, 1 + sum(1 for _ in waiting)
        items.append(item)
    return items, 0


def _shown(row: Answers, labels: Sequence[str], images: Thumbnails) -> dict[str, Any]:
    """Return what the template shows of a row; prompts with the largest differences of scores come first."""
    responses = dict(row["responses"])
    base, first = next(iter(responses.items()))
    differences = [0.0]
    for response in responses.values():
        if response.get("score") is not None and first.get("score") is not None:
            differences.append(abs(response["score"] - first["score"]))
    if row.get("chosen") is not None:
        name = f"{row['label']} response" if "label" in row else "chosen"
        responses[name] = {"text": row["chosen"]}
    columns = [_column(name, response, first, base) for name, response in responses.items()]
    return {
        "title": _title(row["prompt"]),
        "labels": labels,
        "order": 0.0 - max(differences),
        "images": images,
        "prompt": row["prompt"][:_LONGEST_TEXT],
        "responses": columns,
    }


def _title(prompt: str) -> str:
    """Return the beginning of the last turn on one line, without the template's tokens."""
    turns = [_ROLE.sub("", turn).split() for turn in _TEMPLATE_TOKEN.split(prompt)]
    line = " ".join(next(filter(None, reversed(turns)), ()))
    return line if len(line) <= _TITLE_CHARACTERS else line[:_TITLE_CHARACTERS] + "\u2026"


def _column(
    name: str, response: Answers, first: Answers, base: str
) -> tuple[str, str, Sequence[MarkedPiece]]:
    """Return a response's name, notes and marked pieces; words are compared with those of the first one."""
    notes = []
    if response.get("tokens") is not None:
        notes.append(pluralize(response["tokens"], "token"))
    if response.get("finished") is False:
        notes.append("did not end")
    if response.get("score") is not None:
        notes.append(f"score {number(response['score'])}")
    if response is not first and None not in (response.get("logp"), response.get("base_logp")):
        notes.append(f"log-ratio {number(response['logp'] - response['base_logp'])} nats")
    text = response["text"][:_LONGEST_TEXT]
    other = first["text"][:_LONGEST_TEXT]
    pieces = [(text, False)] if text.strip() else []
    if pieces and other.strip() and response is not first:
        pieces, share = mark_differences(text, other)
        note = f"{percent(share)} of its words not in {base}"
        if text == other:
            note = f"the same text as {base}"
        notes.append(note)
    if len(response["text"]) > _LONGEST_TEXT:
        notes.append(f"first {_LONGEST_TEXT:,} of {len(response['text']):,} characters")
    return name, "; ".join(notes), pieces


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
    return [piece for piece in pieces if piece[0]], new / max(len(words), 1)
