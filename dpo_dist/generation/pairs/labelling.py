"""State of a labelling session: items, events on disk, the next comparison of each annotator."""

import bisect
import contextlib
import errno
import hashlib
import heapq
import itertools
import json
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from dpo_dist.data.records import Dialogue, Message, Messages, PreferenceRecord, Prompt, Response
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import locked, sync
from dpo_dist.generation.pairs.files import as_fields

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


class LabelLog:
    """An open log; `events` are those that it had when it was opened."""

    def __init__(self, descriptor: int, events: list[Event]):
        self._descriptor = descriptor
        self.events = events

    def append(self, event: Event) -> None:
        """Write an event and flush it to disk, or raise OSError and change nothing."""
        line = (json.dumps(as_line(event), ensure_ascii=False) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise


@contextlib.contextmanager
def opened_log(path: Path) -> Iterator[LabelLog]:
    """Open or create a log, locked against a second server until the context ends.

    A last line without its end, as a kill during a write may leave it, is removed: it was never acknowledged.

    Raises:
        ConfigError: another process has the log open.
        DataError: a line is damaged.
    """
    remedy = "open the address that it printed, also for a second annotator; or set another run.dir"
    with locked(path, "serves this labelling session", remedy) as descriptor:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        events = [_event(line, path, number) for number, line in enumerate(whole.splitlines(), start=1)]
        os.ftruncate(descriptor, len(whole))
        sync(path.parent)
        yield LabelLog(descriptor, events)


def _event(line: bytes, path: Path, number: int) -> Event:
    try:
        return from_line(json.loads(line))
    except (KeyError, ValueError, TypeError):
        raise DataError(
            "a line of the labelling log is damaged",
            where=f"{path}:{number}",
            expected="the lines as the labelling page wrote them",
            remedy="restore the file from a copy, or delete this line; the other judgements stay",
        ) from None


_THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thoughts")


@dataclass(frozen=True)
class Item:
    """Two responses to a prompt.

    Attributes:
        key: digest of prompt and responses, whatever their order and origin.
        record: the prompt and the two responses, in an order that is unrelated to quality.
    """

    key: str
    record: PreferenceRecord


def draw_items(
    records: Iterable[PreferenceRecord], most: int | None, seed: int, counts: Counter[str]
) -> list[Item]:
    """Return at most `most` items of the records, drawn at random; a record gives one item.

    The draw follows from the seed and the contents: it changes little when records are added. Memory: the
    drawn items only.

    Args:
        records: those with more than two responses give two of them, drawn at random.
        most: number of items; None: all.
        seed: of both draws.
        counts: gets `read`, and records that give no item by reason.
    """
    kept: dict[str, Item] = {}
    heap: list[tuple[int, str]] = []
    for item in _items(records, seed, counts):
        if item.key in kept:
            counts["duplicate"] += 1
            continue
        rank = -_number(seed, "draw", item.key)
        if most is None or len(heap) < most:
            heapq.heappush(heap, (rank, item.key))
        else:
            _, dropped = heapq.heappushpop(heap, (rank, item.key))
            counts["not_drawn"] += 1
            if dropped == item.key:
                continue
            del kept[dropped]
        kept[item.key] = item
    return list(kept.values())


def _items(records: Iterable[PreferenceRecord], seed: int, counts: Counter[str]) -> Iterator[Item]:
    for record in records:
        counts["read"] += 1
        if len(record.responses) < 2:
            counts["one_response"] += 1
        else:
            yield _item(record, seed)


def _item(record: PreferenceRecord, seed: int) -> Item:
    prompt, *responses = (_digest(part) for part in as_fields(record.prompt, record.responses))
    drawn = sorted(range(len(responses)), key=lambda index: _number(seed, prompt, responses[index]))[:2]
    first, second = sorted(drawn, key=lambda index: responses[index])
    pair = replace(record, responses=(record.responses[first], record.responses[second]), scores=None)
    return Item(_digest([prompt, responses[first], responses[second]]), pair)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _number(seed: int, *names: str) -> int:
    digest = hashlib.blake2b("\0".join([str(seed), *names]).encode(), digest_size=8).digest()
    return int.from_bytes(digest)


def shown_prompt(record: PreferenceRecord) -> list[dict[str, Any]]:
    """Return the turns of the prompt as the page shows them, after the names of the tools."""
    turns = [_turn(turn) for turn in _turns(record.prompt)]
    names = [_tool_name(tool) for tool in record.tools]
    tools = [{"role": "tools", "texts": [{"kind": "text", "text": ", ".join(names)}]}] if names else []
    return tools + turns


def shown_response(response: Response) -> list[dict[str, Any]]:
    """Return the turns of a response as the page shows them; the role of a single answer is empty."""
    if isinstance(response, str):
        return [{"role": "", "texts": [{"kind": "text", "text": response}]}]
    turns = [_turn(turn) for turn in response]
    return [turns[0] | {"role": ""}] if len(turns) == 1 else turns


def _turns(prompt: Prompt) -> Messages:
    if isinstance(prompt, Dialogue):
        return prompt.messages()
    return (Message("", prompt),) if isinstance(prompt, str) else prompt


def _turn(message: Message) -> dict[str, Any]:
    """Return the parts of a turn: thoughts, text, and every other field as JSON."""
    texts = []
    others = dict(message.fields)
    for name in _THOUGHTS:
        thoughts = others.pop(name, None)
        if thoughts:
            texts.append({"kind": "thoughts", "text": str(thoughts)})
    if message.content:
        texts.append({"kind": "text", "text": message.content})
    for name, value in others.items():
        if value:
            text = (
                value
                if isinstance(value, str)
                else json.dumps(value, ensure_ascii=False, indent=1, default=str)
            )
            texts.append({"kind": "field", "name": str(name), "text": text})
    return {"role": message.role, "texts": texts}


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    return str((function if isinstance(function, Mapping) else tool).get("name", "?"))


# A repeated comparison is shown again after so many others at least, when the first judgement is forgotten.
REPEAT_GAP = 8
_PACE_OVER = 20


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


class _Annotator:
    """The judgements of one annotator in force: a stack, as only the last one can be taken back.

    Args:
        new: number of items that are new to the annotator.
    """

    def __init__(self, new: int) -> None:
        self.judgements: dict[Slot, Judgement] = {}
        self.undone: list[Slot] = []
        self.seconds: list[float] = []
        self.new = new
        # Ranks of all items that may be new: those from `_unseen` on, and the heap `_open`.
        self._unseen = 0
        self._open: list[int] = []
        self._stack: list[Slot] = []
        # Positions in the stack: of every item, and of those whose repeat is still to come, increasing.
        self._position: dict[str, int] = {}
        self._awaited: list[int] = []

    def push(self, judgement: Judgement, is_repeated: bool) -> None:
        """Add a judgement; `is_repeated` if the annotator is asked for it once more."""
        slot = judgement.slot
        if slot in self.undone:
            self.undone.remove(slot)
        if judgement.verdict is not Verdict.skip:
            self.seconds.append(judgement.seconds)
        if slot.is_repeat:
            self._await(slot.item, False)
        else:
            self._position[slot.item] = len(self._stack)
            self._await(slot.item, is_repeated and judgement.verdict is not Verdict.skip)
        self.judgements[slot] = judgement
        self._stack.append(slot)

    def pop(self, is_repeated: bool) -> None:
        """Take the last judgement back; `is_repeated` as for `push`."""
        slot = self._stack.pop()
        if self.judgements.pop(slot).verdict is not Verdict.skip:
            self.seconds.pop()
        self.undone.append(slot)
        if slot.is_repeat:
            self._await(
                slot.item, is_repeated and self.judgements[Slot(slot.item)].verdict is not Verdict.skip
            )
        else:
            self._await(slot.item, False)
            del self._position[slot.item]

    def _await(self, item: str, is_awaited: bool) -> None:
        position = self._position[item]
        index = bisect.bisect_left(self._awaited, position)
        is_there = self._awaited[index : index + 1] == [position]
        self._awaited[index : index + is_there] = [position] if is_awaited else []

    def reopen(self, rank: int) -> None:
        """Note that the item of this rank may be new again."""
        if rank < self._unseen:
            heapq.heappush(self._open, rank)

    def next_candidate(self, items: int) -> int | None:
        """Return and remove the smallest rank that may be new, of a number of items; None after the last."""
        if self._open:
            return heapq.heappop(self._open)
        if self._unseen == items:
            return None
        self._unseen += 1
        return self._unseen - 1

    @property
    def due_repeats(self) -> int:
        """Number of repeats whose gap is over."""
        return bisect.bisect_left(self._awaited, len(self._stack) - REPEAT_GAP)

    def repeats(self) -> Iterator[Slot]:
        """Yield the repeats whose gap is over, by the time of the first judgement."""
        for position in itertools.islice(self._awaited, self.due_repeats):
            yield Slot(self._stack[position].item, is_repeat=True)

    def is_due_repeat(self, slot: Slot) -> bool:
        """Return whether `slot` is one of `repeats`."""
        position = self._position.get(slot.item, -1)
        index = bisect.bisect_left(self._awaited, position)
        return index < self.due_repeats and self._awaited[index] == position


class Labelling:
    """The comparisons of a session and the judgements in force.

    A judgement costs O(log(items) + annotators).

    Args:
        items: keys of the items.
        plan: their distribution.
        events: earlier judgements and corrections, in order; those of unknown items count as `foreign`.
    """

    def __init__(self, items: Iterable[str], plan: Plan, events: Iterable[Event] = ()):
        self.plan = plan
        self.items: Sequence[str] = sorted(set(items), key=lambda item: (plan.order(item), item))
        self.foreign = 0
        self.number = 0
        """Number of judgements in force, skips among them."""
        self._rank = {item: rank for rank, item in enumerate(self.items)}
        self._shared = frozenset(filter(plan.is_shared, self.items))
        self._nobody = _Annotator(new=len(self.items))
        self._annotators: dict[str, _Annotator] = {}
        self._shown: dict[str, Slot] = {}
        self._judges: dict[str, set[str]] = defaultdict(set)
        for event in events:
            self.apply(event)

    @property
    def judgements(self) -> list[Judgement]:
        """The judgements in force, by annotator in the order of their time."""
        return [one for name in self.annotators for one in self._annotators[name].judgements.values()]

    @property
    def annotators(self) -> list[str]:
        """The names of everyone with a judgement, sorted."""
        return sorted(name for name, one in self._annotators.items() if one.judgements)

    def _annotator(self, name: str) -> _Annotator:
        return self._annotators.setdefault(name, _Annotator(self._nobody.new))

    def accepts(self, event: Event) -> bool:
        """Return whether `event` changes the state; a second verdict on a comparison does not."""
        if isinstance(event, Undo):
            return self.last(event.annotator) == event.slot
        given = self._annotator(event.annotator).judgements
        is_known = event.slot.item in self._rank
        is_due = not event.slot.is_repeat or Slot(event.slot.item) in given
        return is_known and is_due and event.slot not in given

    def apply(self, event: Event) -> None:
        """Change the state by an event; one that is not accepted changes nothing."""
        item, name = event.slot.item, event.annotator
        if item not in self._rank:
            self.foreign += 1
        elif self.accepts(event):
            everyone = [self._nobody, *self._annotators.values()]
            before = [self._is_new(item, one) for one in everyone]
            annotator, is_repeated = self._annotators[name], self.plan.is_repeated(item, name)
            if isinstance(event, Undo):
                annotator.pop(is_repeated)
                self.number -= 1
            else:
                annotator.push(event, is_repeated)
                self.number += 1
            self._recount(item, name)
            for one, was_new in zip(everyone, before, strict=True):
                change = self._is_new(item, one) - was_new
                one.new += change
                if change > 0:
                    one.reopen(self._rank[item])

    def _recount(self, item: str, name: str) -> None:
        judgement = self._annotators[name].judgements.get(Slot(item))
        if judgement is not None and judgement.verdict is not Verdict.skip:
            self._judges[item].add(name)
        else:
            self._judges[item].discard(name)

    def _is_new(self, item: str, annotator: _Annotator) -> bool:
        """Return whether the annotator is to judge the item for the first time."""
        is_open = item in self._shared or not self._judges.get(item)
        return is_open and Slot(item) not in annotator.judgements

    def last(self, annotator: str) -> Slot | None:
        """Return the slot that the annotator judged last; None before the first."""
        one = self._annotators.get(annotator)
        return next(reversed(one.judgements)) if one is not None and one.judgements else None

    def next_slot(self, annotator: str) -> Slot | None:
        """Return the annotator's next comparison, or None after the last; the same one until it is judged.

        Repeats whose gap is over come first. An item that another annotator has on the screen comes last.
        """
        one, shown = self._annotator(annotator), self._shown.get(annotator)
        if one.undone:
            slot: Slot | None = one.undone[-1]
        elif shown is not None and self._is_due(shown, one):
            slot = shown
        else:
            elsewhere = {other.item for name, other in self._shown.items() if name != annotator}
            slot = self._first_due(one, elsewhere - self._shared)
        if slot is None:
            self._shown.pop(annotator, None)
        else:
            self._shown[annotator] = slot
        return slot

    def _is_due(self, slot: Slot, annotator: _Annotator) -> bool:
        return annotator.is_due_repeat(slot) if slot.is_repeat else self._is_new(slot.item, annotator)

    def _first_due(self, annotator: _Annotator, elsewhere: Set[str]) -> Slot | None:
        """Return the first repeat or new item that is not `elsewhere`; if there is none, the first one."""
        repeat = next((slot for slot in annotator.repeats() if slot.item not in elsewhere), None)
        if repeat is not None:
            return repeat
        new = self._first_new(annotator, elsewhere)
        if new is not None and new.item not in elsewhere:
            return new
        return next(annotator.repeats(), new)

    def _first_new(self, annotator: _Annotator, elsewhere: Set[str]) -> Slot | None:
        found: list[int] = []
        while (rank := annotator.next_candidate(len(self.items))) is not None:
            if self._is_new(self.items[rank], annotator):
                found.append(rank)
                if self.items[rank] not in elsewhere:
                    break
        for rank in found:
            annotator.reopen(rank)
        free = [rank for rank in found if self.items[rank] not in elsewhere]
        return Slot(self.items[(free or found)[0]]) if found else None

    def progress(self, annotator: str) -> Progress:
        """Return the annotator's progress; `remaining` shrinks as others judge items, too."""
        one = self._annotator(annotator)
        done, seconds = len(one.seconds), one.seconds[-_PACE_OVER:]
        pace = statistics.median(seconds) if seconds else None
        return Progress(done, len(one.judgements) - done, one.new + one.due_repeats, pace)
