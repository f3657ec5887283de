"""State of a labelling session: the next comparison of each annotator, judgements, corrections, progress.

It is a function of the items, the plan and the events so far, so that a restart continues from the log.
"""

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

# A repeated comparison is shown again after so many others at least, when the first judgement is forgotten.
REPEAT_GAP = 8
_PACE_OVER = 20
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


@dataclass(frozen=True)
class Plan:
    """The distribution of items to annotators.

    Attributes:
        seed: of the order of items, the sides, and the items judged more than once.
        overlap: share of the items that every annotator judges; the others are judged by one.
        repeats: share of an annotator's judgements that they are asked for once more.
    """

    seed: int = 0
    overlap: float = 0.2
    repeats: float = 0.1

    def order(self, item: str) -> float:
        """Return the rank of an item among all, in [0, 1)."""
        return self._number("order", item)

    def is_shared(self, item: str) -> bool:
        """Return whether every annotator judges the item."""
        return self._number("shared", item) < self.overlap

    def is_repeated(self, item: str, annotator: str) -> bool:
        """Return whether the annotator is asked once more."""
        return self._number("repeated", item, annotator) < self.repeats

    def left(self, slot: Slot, annotator: str) -> int:
        """Return the index of the response on the left; a repeat has the sides exchanged."""
        first = int(self._number("left", slot.item, annotator) < 0.5)
        return 1 - first if slot.is_repeat else first

    def _number(self, *names: str) -> float:
        digest = hashlib.blake2b("\0".join([str(self.seed), *names]).encode(), digest_size=7).digest()
        return int.from_bytes(digest) / 256**7


@dataclass(frozen=True)
class Progress:
    """An annotator's position: comparisons judged, skipped and remaining; median seconds of the last ones."""

    done: int
    skipped: int
    remaining: int
    pace: float | None


class Labelling:
    """The comparisons of a session and the judgements in force.

    Args:
        items: keys of the items.
        plan: their distribution.
        events: earlier judgements and corrections, in order; those of unknown items count as `foreign`.
    """

    def __init__(self, items: Iterable[str], plan: Plan, events: Iterable[Event] = ()):
        self.plan = plan
        self.items: Sequence[str] = sorted(set(items), key=lambda item: (plan.order(item), item))
        self.foreign = 0
        self._known = frozenset(self.items)
        self._shared = frozenset(filter(plan.is_shared, self.items))
        self._by_annotator: dict[str, dict[Slot, Judgement]] = defaultdict(dict)
        self._undone: dict[str, list[Slot]] = defaultdict(list)
        self._shown: dict[str, Slot] = {}
        self._judges: dict[str, set[str]] = defaultdict(set)
        for event in events:
            self.apply(event)

    @property
    def judgements(self) -> list[Judgement]:
        """The judgements in force, by annotator in the order of their time."""
        return [one for given in self._by_annotator.values() for one in given.values()]

    @property
    def annotators(self) -> list[str]:
        """The names of everyone with a judgement, sorted."""
        return sorted(name for name, given in self._by_annotator.items() if given)

    def accepts(self, event: Event) -> bool:
        """Return whether `event` changes the state; a second verdict on a comparison does not."""
        given = self._by_annotator.get(event.annotator, {})
        if isinstance(event, Undo):
            return bool(given) and next(reversed(given)) == event.slot
        is_known = event.slot.item in self._known
        is_due = not event.slot.is_repeat or Slot(event.slot.item) in given
        return is_known and is_due and event.slot not in given

    def apply(self, event: Event) -> None:
        """Change the state by an event; one that is not accepted changes nothing."""
        if event.slot.item not in self._known:
            self.foreign += 1
        elif self.accepts(event):
            given, undone = self._by_annotator[event.annotator], self._undone[event.annotator]
            if isinstance(event, Undo):
                given.pop(event.slot)
                undone.append(event.slot)
            else:
                given[event.slot] = event
                if event.slot in undone:
                    undone.remove(event.slot)
            self._recount(event.slot.item, event.annotator)

    def _recount(self, item: str, annotator: str) -> None:
        judgement = self._by_annotator[annotator].get(Slot(item))
        if judgement is not None and judgement.verdict is not Verdict.skip:
            self._judges[item].add(annotator)
        else:
            self._judges[item].discard(annotator)

    def last(self, annotator: str) -> Slot | None:
        """Return the slot that the annotator judged last; None before the first."""
        given = self._by_annotator.get(annotator)
        return next(reversed(given)) if given else None

    def next_slot(self, annotator: str) -> Slot | None:
        """Return the annotator's next comparison, or None after the last; the same one until it is judged.

        An item that another annotator has on the screen comes last.
        """
        shown = self._shown.get(annotator)
        due = self._due(annotator)
        if self._undone[annotator]:
            slot: Slot | None = self._undone[annotator][-1]
        elif shown is not None and shown in due:
            slot = shown
        else:
            elsewhere = {other.item for name, other in self._shown.items() if name != annotator}
            elsewhere -= self._shared
            slot = next((one for one in due if one.item not in elsewhere), due[0] if due else None)
        if slot is None:
            self._shown.pop(annotator, None)
        else:
            self._shown[annotator] = slot
        return slot

    def _due(self, annotator: str) -> list[Slot]:
        """Return the annotator's open slots: repeats whose gap is over, then new items in order."""
        given = self._by_annotator.get(annotator, {})
        repeats = []
        for position, (slot, judgement) in enumerate(given.items()):
            again = Slot(slot.item, is_repeat=True)
            if (
                not slot.is_repeat
                and judgement.verdict is not Verdict.skip
                and again not in given
                and len(given) - position > REPEAT_GAP
                and self.plan.is_repeated(slot.item, annotator)
            ):
                repeats.append(again)
        judged = {slot.item for slot in given}
        return repeats + [
            Slot(item)
            for item in self.items
            if item not in judged and (item in self._shared or not self._judges.get(item))
        ]

    def progress(self, annotator: str) -> Progress:
        """Return the annotator's progress; `remaining` shrinks as others judge items, too."""
        given = list(self._by_annotator.get(annotator, {}).values())
        skipped = sum(one.verdict is Verdict.skip for one in given)
        seconds = [one.seconds for one in given if one.verdict is not Verdict.skip][-_PACE_OVER:]
        pace = statistics.median(seconds) if seconds else None
        return Progress(len(given) - skipped, skipped, len(self._due(annotator)), pace)


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
