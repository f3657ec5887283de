"""Types of preference data before tokenization: every format is read into `PreferenceRecord`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dpo_dist.foundation.errors import DataError

DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_MAX_SHOWN_CHARACTERS = 40
_MAX_SHOWN_WORDS = 3


Fields: TypeAlias = Mapping[str, Any]
"""The fields of an input record, or of a part of it, by name."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant`, `tool`, ...
        content: empty if the turn only calls tools.
        fields: what a chat template renders besides the content: `tool_calls` (arguments as objects),
            `tool_call_id`, `name`, `reasoning_content`, `thinking`.
        is_trained: whether the data say that the loss counts this turn of a response; None: by its role.
    """

    role: str
    content: str
    fields: Fields = field(default_factory=dict)
    is_trained: bool | None = None


Text: TypeAlias = str
Messages: TypeAlias = tuple[Message, ...]
Response: TypeAlias = Text | Messages
"""The content of one assistant turn; or all turns after the prompt, of which the last is the assistant's."""


@dataclass(frozen=True)
class Dialogue:
    """A conversation in one string with `Human:` and `Assistant:` turns, as in HH-RLHF.

    `text` starts with a turn and ends with the last ``"\\n\\nAssistant:"``, after which a response follows.
    It is encoded as messages if the tokenizer has a chat template, else as text.
    """

    text: str

    @property
    def contents(self) -> Text:
        """The texts of all turns in one."""
        return DIALOGUE_TURN.sub("", self.text)

    def messages(self) -> Messages:
        """Return the turns before the response, their contents stripped."""
        before, *parts = DIALOGUE_TURN.split(self.text)
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

    Attributes:
        prompt: plain text or a conversation.
        responses: each follows the prompt; messages only after messages.
        origin: position of the record.
        scores: in the order of `responses`, None if the source has none; those of a ranking never rise, and
            equal scores are ties.
        tools: definitions of the tools that the chat template renders, as JSON objects.
        template_arguments: further arguments of the chat template for this record (`enable_thinking`).
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    origin: Origin
    scores: tuple[float, ...] | None = None
    tools: tuple[Fields, ...] = ()
    template_arguments: Fields = field(default_factory=dict)

    @property
    def response_texts(self) -> tuple[str, ...]:
        """The responses of a record whose responses are texts."""
        assert all(isinstance(response, str) for response in self.responses)
        return tuple(map(str, self.responses))


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


def bad_record_error(bad: BadRecord) -> DataError:
    """Return the error for a record that cannot be used where `data.on_bad_record` is `error`."""
    return DataError(
        f"a record cannot be used: {bad.reason}",
        where=str(bad.origin),
        got=bad.detail,
        remedy="correct the record, or set data.on_bad_record=drop",
    )


class UnusableRecordError(Exception):
    """Raised inside the readers of a record, and returned by them as a `BadRecord`."""

    def __init__(self, reason: str, detail: str = "", unread: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.unread = reason, detail, unread

    def at(self, origin: Origin) -> BadRecord:
        """Return the reason with the record's position."""
        return BadRecord(self.reason, origin, self.detail, self.unread)


RawRecord: TypeAlias = tuple[Fields | BadRecord, Origin]
"""An input record, or the reason why it cannot be read, and its origin."""


def text_characters(record: PreferenceRecord) -> int:
    """Return about how many characters the texts of a record have."""
    prompt = record.prompt.text if isinstance(record.prompt, Dialogue) else record.prompt
    texts = [prompt, *record.responses]
    return sum(
        len(text) if isinstance(text, str) else sum(len(turn.content) for turn in text) for text in texts
    )


def shown_key(key: Any) -> str:
    """Return a field's name for a message; the length of a name that may be a text of the record."""
    name = str(key)
    if len(name) > _MAX_SHOWN_CHARACTERS or len(name.split()) > _MAX_SHOWN_WORDS or not name.isprintable():
        return f"a name of {len(name)} characters"
    return name
