"""A preference as people wrote it down, before any tokenizer: what every format is read into."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

_TURN = re.compile(r"\n\n(Human|Assistant):")
_LONGEST_NAME = 40
_MOST_WORDS = 3
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Text: TypeAlias = str
Messages: TypeAlias = tuple[Message, ...]


@dataclass(frozen=True)
class Dialogue:
    """A conversation written as one text with `Human:` and `Assistant:` turns, as HH-RLHF has it.

    `text` starts with a turn and ends with the last ``"\\n\\nAssistant:"``; what follows it is a response.
    Whether it is encoded as it stands or as messages depends on the tokenizer.
    """

    text: str

    def messages(self) -> Messages:
        """The turns before the response, their contents stripped."""
        before, *parts = _TURN.split(self.text)
        assert not before, "a dialogue starts with a turn"
        turns = zip(parts[:-2:2], parts[1:-2:2], strict=True)
        return tuple(Message(_ROLES[speaker], content.strip()) for speaker, content in turns)


Prompt: TypeAlias = Text | Messages | Dialogue


@dataclass(frozen=True)
class Origin:
    """Where a record was read: `source` as configured, `line` 1-based (a record number where lines fail)."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt and its responses, best first (one: to be learnt; two: chosen, rejected; more: a ranking).

    `prompt` is plain text, taken as it stands, or a conversation; `responses` are what follows it, each the
    text of one answer (for messages: the content of one assistant turn). `scores`, where the source has
    them, stand beside the responses; those of a ranking never rise, and equal ones are ties.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    origin: Origin
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used.

    `reason` is the name under which it is counted; `unread` are fields that it has and that are not read, and
    these are counted by their names as well. `detail` never quotes a text of the record.
    """

    reason: str
    origin: Origin
    detail: str = ""
    unread: tuple[str, ...] = ()


Located: TypeAlias = tuple[Mapping[str, Any] | BadRecord, Origin]
"""What a source has at one place, not yet read as a record."""


def shown_key(key: Any) -> str:
    """A field's name as messages show it; one that may be a text (of a file without header) by its length."""
    name = str(key)
    if len(name) > _LONGEST_NAME or len(name.split()) > _MOST_WORDS or not name.isprintable():
        return f"a name of {len(name)} characters"
    return name
