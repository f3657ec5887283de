"""Types of preference data before tokenization: every format is read into `PreferenceRecord`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_MAX_SHOWN_CHARACTERS = 40
_MAX_SHOWN_WORDS = 3


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Text: TypeAlias = str
Messages: TypeAlias = tuple[Message, ...]


@dataclass(frozen=True)
class Dialogue:
    """A conversation in one string with `Human:` and `Assistant:` turns, as in HH-RLHF.

    `text` starts with a turn and ends with the last ``"\\n\\nAssistant:"``, after which a response follows.
    It is encoded as messages if the tokenizer has a chat template, else as text.
    """

    text: str

    def messages(self) -> Messages:
        """Return the turns before the response, their contents stripped."""
        before, *parts = _TURN.split(self.text)
        assert not before, "a dialogue starts with a turn"
        turns = zip(parts[:-2:2], parts[1:-2:2], strict=True)
        return tuple(Message(_ROLES[name], content.strip()) for name, content in turns)


Prompt: TypeAlias = Text | Messages | Dialogue


@dataclass(frozen=True)
class Origin:
    """Position of a record in its source.

    `source` is a path as configured; `line` is 1-based: a line number, or a record number in files that are
    not read by lines.
    """

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


Fields: TypeAlias = Mapping[str, Any]
"""The fields of an input record by name."""


@dataclass(frozen=True)
class RawContent:
    """The prompt and the responses of a record, with values as in the source.

    Attributes:
        prompt: text or messages; None if the responses contain it.
        responses: text or messages each, best first, by the names that error messages use.
        scores: of each response, finite; None if the source has none.
        has_context: whether `prompt` already includes the record's system text, history and input.
    """

    prompt: Any
    responses: Fields
    scores: tuple[float, ...] | None = None
    has_context: bool = False


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt and its responses, best first: one to learn, two (chosen, rejected), or a ranking of more.

    `prompt` is plain text or a conversation. `responses` follow it; each is the text of one response (for
    messages: the content of one assistant turn). `scores` are in the order of `responses`, None if the source
    has none; those of a ranking never rise, and equal scores are ties.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    origin: Origin
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used.

    Attributes:
        reason: the name under which it is counted.
        origin: its position in the source.
        detail: more about the reason, without any text of the record.
        unread: fields of the record that no format reads; each is counted by its name too.
    """

    reason: str
    origin: Origin
    detail: str = ""
    unread: tuple[str, ...] = ()


RawRecord: TypeAlias = tuple[Fields | BadRecord, Origin]
"""An input record, or the reason why it cannot be read, and its origin."""


def shown_key(key: Any) -> str:
    """Return a field's name for a message; the length of a name that may be a text of the record."""
    name = str(key)
    if len(name) > _MAX_SHOWN_CHARACTERS or len(name.split()) > _MAX_SHOWN_WORDS or not name.isprintable():
        return f"a name of {len(name)} characters"
    return name
