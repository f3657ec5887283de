"""Find the turns of a conversation in the output of a chat template.

The template is changed so that each loop over messages writes a mark before and after its body. Its own
decisions do not change, because contents do not: only the messages get two further fields.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.data.tokenization.marks import RESERVED_CHARACTER

Span = tuple[int, int]
"""Start and end of a part of a text, in characters."""

_START, _END = "dpo_dist_turn_start", "dpo_dist_turn_end"
_MARK = re.compile(f"{RESERVED_CHARACTER}(start|end)(\\d+){RESERVED_CHARACTER}")
_COMMENT_OR_LOOP = re.compile(
    r"\{#.*?#\}|\{%(?P<open>[-+]?)\s*(?P<body>(?:for|endfor)\b.*?)(?P<close>[-+]?)%\}", re.DOTALL
)
_TARGET = re.compile(r"for\s+(\w+)\s+in\b")


@dataclass(frozen=True)
class Trace:
    """The output of a template and the position of its turns.

    Attributes:
        text: the output.
        spans: of each turn; None if the template does not write it inside a loop over messages.
        end: position after the last turn; the generation prompt follows.
    """

    text: str
    spans: list[Span | None]
    end: int


def traced_template(template: str) -> str:
    """Return the template with marks around the body of each loop."""
    targets: list[str | None] = []

    def with_marks(found: re.Match[str]) -> str:
        tag, body = found.group(), found["body"]
        if body is None:
            return tag
        # `print` is a statement: the whitespace around it is trimmed as around the tag of the loop.
        if body.startswith("for"):
            target = _TARGET.match(body)
            targets.append(target[1] if target else None)
            start = f"%}}{{% {_print(target[1], _START)} {found['close']}%}}" if target else ""
            return f"{{%{found['open']} {body} {start}" if target else tag
        name = targets.pop() if targets else None
        return f"{{%{found['open']} {_print(name, _END)} %}}{{% {body} {found['close']}%}}" if name else tag

    return _COMMENT_OR_LOOP.sub(with_marks, template)


def traced_turn(turn: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a turn with the marks that a traced template writes around it."""
    marks = {_START: f"start{index}", _END: f"end{index}"}
    return {**turn, **{key: f"{RESERVED_CHARACTER}{mark}{RESERVED_CHARACTER}" for key, mark in marks.items()}}


def read_trace(rendered: str, turns: int) -> Trace | None:
    """Return the turns in the output of a traced template; None if one is written twice or left open."""
    text, end, removed = _MARK.sub("", rendered), 0, 0
    spans: list[Span | None] = [None] * turns
    opened: dict[int, int] = {}
    for found in _MARK.finditer(rendered):
        index, position = int(found[2]), found.start() - removed
        removed += len(found.group())
        if found[1] == "start":
            opened[index] = position
            continue
        end, start = position, opened.pop(index, position)
        # A loop without output only computes.
        if text[start:position].strip():
            if spans[index] is not None:
                return None
            spans[index] = (start, position)
    return None if opened else Trace(text, spans, end)


def _print(name: str, key: str) -> str:
    return f"print ({name} is mapping and {name}['{key}']) or ''"
