"""Events of a labelling session: judgements and corrections; their lines in the log."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

_LONGEST_SECONDS = 24 * 3600.0

Verdict = StrEnum("Verdict", ["first", "second", "tie", "skip"])


@dataclass(frozen=True)
class Slot:
    """One comparison for one annotator: an item, shown for the first time or once more."""

    item: str
    is_repeat: bool = False

    def __str__(self) -> str:
        return f"{self.item}{'+' if self.is_repeat else ''}"

    @classmethod
    def parse(cls, text: str) -> "Slot":
        """Return the slot that `str` wrote."""
        return cls(text.removesuffix("+"), text.endswith("+"))


@dataclass(frozen=True)
class Judgement:
    """An annotator's verdict on a slot.

    Attributes:
        slot: the comparison.
        annotator: their name.
        verdict: the better response in the item's own order, `tie`, or `skip`.
        left: index of the response that was shown on the left: 0 or 1.
        seconds: from the display to the verdict.
        time: of the verdict, ISO 8601.
    """

    slot: Slot
    annotator: str
    verdict: Verdict
    left: int
    seconds: float
    time: str


@dataclass(frozen=True)
class Undo:
    """An annotator takes the judgement of a slot back."""

    slot: Slot
    annotator: str
    time: str


Event = Judgement | Undo


def as_line(event: Event) -> dict[str, Any]:
    """Return an event as a JSON object for the log."""
    kind = "undo" if isinstance(event, Undo) else "judgement"
    return {"event": kind, **asdict(event), "slot": str(event.slot)}


def from_line(line: Mapping[str, Any]) -> Event:
    """Return the event of a line of the log.

    Raises:
        KeyError, ValueError, TypeError: the line is not one of this log.
    """
    slot, annotator, time = Slot.parse(str(line["slot"])), str(line["annotator"]), str(line["time"])
    if line["event"] == "undo":
        return Undo(slot, annotator, time)
    seconds = min(max(float(line["seconds"]), 0.0), _LONGEST_SECONDS)
    return Judgement(slot, annotator, Verdict(line["verdict"]), int(line["left"]), seconds, time)
