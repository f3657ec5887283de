"""A preference as people wrote it down, before any tokenizer: what every format is read into."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Text: TypeAlias = str
Messages: TypeAlias = tuple[Message, ...]


@dataclass(frozen=True)
class Origin:
    """Where a record was read: `source` as configured, `line` 1-based (or the record's number)."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt and its ranked responses, best first (two: chosen, rejected).

    `prompt` is plain text, taken as it stands, or a conversation; `responses` are what follows it, each the
    text of one answer (for a conversation: the content of one assistant turn). `scores`, where the source
    has them, stand beside the responses.
    """

    prompt: Text | Messages
    responses: tuple[str, ...]
    origin: Origin
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used; `reason` is the name under which it is counted."""

    reason: str
    origin: Origin
    detail: str = ""
