"""Show answers: prompts with the responses of models side by side.

A row of answers is a line of `samples/step-*.jsonl` or `comparison/answers.jsonl`: `prompt`, `responses` by
name, the first one the base, and perhaps `chosen` with its `label`, and `images`. A response has `text` and
perhaps `tokens`, `finished` and `score`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_dist.foundation.text import number, pluralize
from dpo_dist.tools.pages.blocks import Answers, PageBlock, Piece, Text
from dpo_dist.tools.pages.thumbnails import only_thumbnails

AnswersRow = Mapping[str, Any]

_LONGEST_TEXT = 6000
_OPEN = 2
_TITLE_CHARACTERS = 120
_TEMPLATE_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")
_ROLE = re.compile(r"\A\s*(system|user|assistant|model)\s*(\n|\Z)")


def answer_blocks(prompts: Iterable[tuple[AnswersRow, str]], room: int) -> list[PageBlock]:
    """Return prompts while their texts fit into `room` characters, and a sentence about those left out.

    A row of answers comes with its labels, which are shown after its title.
    """
    blocks: list[PageBlock] = []
    waiting = iter(prompts)
    for row, labels in waiting:
        room -= len(str(row["prompt"])) + sum(len(each["text"]) for each in row["responses"].values())
        if room < 0:
            left_out = pluralize(1 + sum(1 for _ in waiting), "more prompt")
            return [*blocks, Text(f"{left_out} would make this page too large.", "note")]
        responses = dict(row["responses"])
        base, first = next(iter(responses.items()))
        if row.get("chosen") is not None:
            name = f"{row['label']} response" if "label" in row else "chosen"
            responses[name] = {"text": row["chosen"]}
        answers = Answers(
            _title(row["prompt"]),
            labels,
            [(row["prompt"][:_LONGEST_TEXT], "")],
            [(name, *_column(response, first, base)) for name, response in responses.items()],
            only_thumbnails(row.get("images", ())),
            is_open=len(blocks) < _OPEN,
        )
        blocks.append(answers)
    return blocks


def _title(prompt: str) -> str:
    """Return the beginning of the last turn on one line, without the template's tokens."""
    turns = [_ROLE.sub("", turn).split() for turn in _TEMPLATE_TOKEN.split(prompt)]
    line = " ".join(next(filter(None, reversed(turns)), ()))
    return line if len(line) <= _TITLE_CHARACTERS else line[:_TITLE_CHARACTERS] + "\u2026"


def _column(response: AnswersRow, first: AnswersRow, base: str) -> tuple[str, list[Piece]]:
    """Return a response's notes and text."""
    notes = []
    if response.get("tokens") is not None:
        notes.append(pluralize(response["tokens"], "token"))
    if response.get("finished") is False:
        notes.append("did not end")
    if response.get("score") is not None:
        notes.append(f"score {number(response['score'])}")
    text = response["text"][:_LONGEST_TEXT]
    if response is not first and text.strip() and response["text"] == first["text"]:
        notes.append(f"the same text as {base}")
    if len(response["text"]) > _LONGEST_TEXT:
        notes.append(f"first {_LONGEST_TEXT:,} of {len(response['text']):,} characters")
    return "; ".join(notes), [(text, "")] if text.strip() else []
