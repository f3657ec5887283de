"""Requests of the labelling page: the next comparison, a verdict, a step back."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from dpo_dist.generation.labelling.events import Event, Judgement, Slot, Undo, Verdict
from dpo_dist.generation.labelling.items import Item, shown_prompt, shown_response
from dpo_dist.generation.labelling.log import LabelLog
from dpo_dist.generation.labelling.state import Labelling


class RefusedError(Exception):
    """A request that is refused, with its HTTP status."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Session:
    """The state behind the page; every method is safe from any thread.

    Args:
        items: by key.
        state: judgements so far.
        log: receives every event before it changes the state.
        is_blurred: whether texts are hidden until the annotator points at them.
        judged: called after each event.
    """

    def __init__(
        self,
        items: Mapping[str, Item],
        state: Labelling,
        log: LabelLog,
        is_blurred: bool = False,
        judged: Callable[[Labelling], None] = lambda _: None,
    ):
        self._items, self._log, self._judged = items, log, judged
        self._blurred = is_blurred
        self.state = state
        self._lock = threading.Lock()
        self._is_closed = False

    def close(self) -> None:
        """Refuse further events: a browser's open connection outlives the server, and then the log."""
        with self._lock:
            self._is_closed = True

    def comparison(self, annotator: str) -> dict[str, Any]:
        """Return the annotator's next comparison and progress as JSON."""
        with self._lock:
            return self._comparison(annotator)

    def judge(self, annotator: str, slot: Slot, choice: str, seconds: float) -> dict[str, Any]:
        """Store a verdict, unless this comparison has one, and return the next comparison.

        Args:
            annotator: their name.
            slot: the comparison.
            choice: `left`, `right`, `tie` or `skip`.
            seconds: from the display to the verdict.
        """
        with self._lock:
            left = self.state.plan.left(slot, annotator)
            verdict = {
                "left": (Verdict.first, Verdict.second)[left],
                "right": (Verdict.second, Verdict.first)[left],
                "tie": Verdict.tie,
                "skip": Verdict.skip,
            }[choice]
            is_new = self._store(Judgement(slot, annotator, verdict, left, round(seconds, 2), _now()))
            return self._comparison(annotator) | {"stored": is_new}

    def undo(self, annotator: str, judged: int) -> dict[str, Any]:
        """Take the annotator's last judgement back, and return its comparison.

        Args:
            annotator: their name.
            judged: number of their judgements and skips that the page knows; another number means that it is
                behind, and nothing is undone.
        """
        with self._lock:
            last, progress = self.state.last(annotator), self.state.progress(annotator)
            is_done = last is not None and judged == progress.done + progress.skipped
            if last is not None and is_done:
                self._store(Undo(last, annotator, _now()))
            return self._comparison(annotator) | {"stored": is_done}

    def _store(self, event: Event) -> bool:
        if self._is_closed:
            raise RefusedError(503, "the command has ended")
        if not self.state.accepts(event):
            return False
        try:
            self._log.append(event)
        except OSError as fault:
            raise RefusedError(507, f"the judgement cannot be written: {fault.strerror}") from fault
        self.state.apply(event)
        self._judged(self.state)
        return True

    def _comparison(self, annotator: str) -> dict[str, Any]:
        reply: dict[str, Any] = {
            "annotators": self.state.annotators,
            "blurred": self._blurred,
            "item": None,
        }
        if annotator:
            slot = self.state.next_slot(annotator)
            reply["progress"] = asdict(self.state.progress(annotator))
            if slot is not None:
                record = self._items[slot.item].record
                left = self.state.plan.left(slot, annotator)
                reply["item"] = {
                    "slot": str(slot),
                    "prompt": shown_prompt(record),
                    "left": shown_response(record.responses[left]),
                    "right": shown_response(record.responses[1 - left]),
                }
        return reply


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
