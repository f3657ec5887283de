"""Wall-clock time of a run by kind of work, summed over its starts."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.report.metrics_log import Work


@dataclass
class WorkTime:
    """The time of a run so far; part of every checkpoint.

    Attributes:
        seconds: by kind of work, of all starts. Every moment of a start counts as one kind.
        device_seconds: the same in all, times the processes of each start.
        since_step: number of the first steps of which only `training` is known; an earlier version did them.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    device_seconds: float = 0.0
    since_step: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "WorkTime":
        """Return the time in a checkpoint's state; older ones only have that of the training steps."""
        if "work" in state:
            return cls(**state["work"])
        seconds = float(state["train_seconds"])
        return cls({"training": seconds}, seconds * state.get("world_size", 1), int(state["step"]))

    def add(self, work: str, seconds: float, processes: int) -> None:
        """Add the time that all processes spent on a kind of work."""
        self.seconds[work] = self.seconds.get(work, 0.0) + seconds
        self.device_seconds += seconds * processes

    def as_dict(self) -> dict[str, Any]:
        """Return the section `work` of summary.json."""
        return {
            "seconds": {work: round(seconds, 3) for work, seconds in self.seconds.items()},
            "device_seconds": round(self.device_seconds, 3),
            "since_step": self.since_step,
        }


class WorkClock:
    """Clock of one start, which begins with the work `starting`.

    Args:
        processes: of the run.
        started: the time of the start, by `time.monotonic`.
        entered: called with every kind of work that begins.
    """

    def __init__(self, processes: int, started: float, entered: Callable[[str], None] | None = None):
        self._processes, self._marked = processes, started
        self._entered = entered
        self._work: Work = "starting"
        self._spent = WorkTime()

    def resume(self, former: WorkTime) -> None:
        """Continue the time of the starts before."""
        for work, seconds in self._spent.seconds.items():
            former.add(work, seconds, self._processes)
        self._spent = former

    def enter(self, work: Work) -> None:
        """Count the time from now on as `work`."""
        now = time.monotonic()
        self._spent.add(self._work, now - self._marked, self._processes)
        if self._entered is not None and work != self._work:
            self._entered(work)
        self._work, self._marked = work, now

    @contextlib.contextmanager
    def of(self, work: Work) -> Iterator[None]:
        """Count the time of the block as `work`, also where it is part of another work."""
        outer = self._work
        self.enter(work)
        try:
            yield
        finally:
            self.enter(outer)

    def read(self) -> WorkTime:
        """Return the time until now, which a later call changes."""
        self.enter(self._work)
        return self._spent
