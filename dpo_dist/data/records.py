"""Preference data before tokenisation: every format is read into `PreferenceRecord`."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dpo_dist.config.data import Ranked
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

    `fields` are what a chat template renders besides the content: `tool_calls` (arguments as objects),
    `tool_call_id`, `name`, `reasoning_content`, `thinking`. `is_trained`: whether the data say that the loss
    counts this turn of a response; None: by its role.
    """

    role: str
    content: str
    fields: Fields = field(default_factory=dict)
    is_trained: bool | None = None


Text: TypeAlias = str
Messages: TypeAlias = tuple[Message, ...]
Response: TypeAlias = Text | Messages
"""The content of one assistant turn; or all turns after the prompt, of which the last is the assistant's."""


class Dialogue(tuple[Message, ...]):
    """The messages of a prompt that one text spells with `Human:` and `Assistant:` turns, as in HH-RLHF.

    `text` starts with a turn and ends with the last ``"\\n\\nAssistant:"``, before a response. It is
    encoded if the tokenizer has no chat template. The contents of the messages are stripped.
    """

    text: str

    def __new__(cls, text: str) -> "Dialogue":
        """Split a text into its turns."""
        _, *parts = DIALOGUE_TURN.split(text)
        turns = zip(parts[:-2:2], parts[1:-2:2], strict=True)
        dialogue = super().__new__(cls, (Message(_ROLES[name], content.strip()) for name, content in turns))
        dialogue.text = text
        return dialogue

    def __getnewargs__(self) -> tuple[str]:
        return (self.text,)


Prompt: TypeAlias = Text | Messages


@dataclass(frozen=True)
class Origin:
    """Position of a record: its source as configured, and the 1-based line or number of the record in it."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt and its responses, best first: one to learn, two (chosen, rejected), or a ranking of more.

    Responses are messages only after messages. Scores are in their order; those of a ranking never rise, and
    equal ones are ties. The chat template renders the `tools` and gets the `template_arguments`.
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
    """A record that cannot be used, by a reason of counts.yaml.

    The `detail` has no text of the record. `unread` are fields that no format reads, counted by their names.
    """

    reason: str
    origin: Origin
    detail: str = ""
    unread: tuple[str, ...] = ()


class UnusableRecordError(Exception):
    """Raised where a record turns out to be unusable; `at` makes it a `BadRecord`."""

    def __init__(self, reason: str, detail: str = "", unread: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.unread = reason, detail, unread

    def at(self, origin: Origin) -> BadRecord:
        """Return the reason with the record's position."""
        return BadRecord(self.reason, origin, self.detail, self.unread)


RawRecord: TypeAlias = tuple[Fields | BadRecord, Origin]
"""An input record, or the reason why it cannot be read, and its origin."""

Ranks: TypeAlias = tuple[int, ...]


def bad_record_error(bad: BadRecord) -> DataError:
    """Return the error for a record that cannot be used where `data.on_bad_record` is `error`."""
    return DataError(
        f"a record cannot be used: {bad.reason}",
        where=str(bad.origin),
        got=bad.detail,
        remedy="correct the record, or set data.on_bad_record=drop",
    )


def training_examples(record: PreferenceRecord, ranked: Ranked) -> tuple[list[Ranks], int]:
    """Return the training examples of a record, each as indices of its responses, best first, and the ties.

    `whole` is one ranking with the first of responses with equal scores, `best_worst` the first and the last
    response, `all_pairs` every two responses with different scores. One or two responses are one example.
    Ties are the responses (`whole`) or pairs (`all_pairs`) omitted because of equal scores.
    """
    indices = range(len(record.responses))
    if len(indices) <= 2:
        return [tuple(indices)], 0
    # Without scores the order itself is the ranking.
    scores = record.scores or tuple(-float(index) for index in indices)
    match ranked:
        case Ranked.whole:
            distinct = tuple(index for index in indices if index == 0 or scores[index] != scores[index - 1])
            return [distinct], len(indices) - len(distinct)
        case Ranked.best_worst:
            return [(0, indices[-1])], 0
        case Ranked.all_pairs:
            pairs = list(itertools.combinations(indices, 2))
            untied: list[Ranks] = [pair for pair in pairs if scores[pair[0]] != scores[pair[1]]]
            return untied, len(pairs) - len(untied)


def text_characters(record: PreferenceRecord) -> int:
    """Return about how many characters the texts of a record have."""
    return sum(
        len(text) if isinstance(text, str) else sum(len(turn.content) for turn in text)
        for text in (record.prompt, *record.responses)
    )


def shown_key(key: Any) -> str:
    """Return a field's name for a message; the length of a name that may be a text of the record."""
    name = str(key)
    if len(name) > _MAX_SHOWN_CHARACTERS or len(name.split()) > _MAX_SHOWN_WORDS or not name.isprintable():
        return f"a name of {len(name)} characters"
    return name
