"""Clocks for the phases of a step, and for the kinds of work of a run."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # pages of runs read the names below, and need no torch
    import torch

Phase = Literal["data", "reference", "forward", "backward", "optimizer", "checkpoint", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)  # of a step, with the key `time/<phase>` in a metrics row

Work = Literal["starting", "reference", "training", "evaluation", "samples", "saving", "other"]


class StepClock:
    """Measures one step's seconds by phase, from construction on.

    On CUDA the host only queues work, so that phases are timed by events in the device's stream; a phase
    includes time that the device waits for the host. Elsewhere the host's clock times the phases.
    """

    def __init__(self, device: "torch.device"):
        self._started = time.monotonic()
        self._on_cuda = device.type == "cuda"
        self._phases: list[Phase] = []
        self._starts: list[Any] = []

    def enter(self, phase: Phase) -> None:
        """Start `phase`, which lasts until the next call; never waits for the device."""
        self._phases.append(phase)
        if self._on_cuda:
            import torch  # noqa: PLC0415

            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._starts.append(event)
        else:
            self._starts.append(time.monotonic())

    def stop(self) -> dict[Phase, float]:
        """Return the seconds of every phase; `other` includes the rest, so that the sum is the whole step.

        Call it when the host has waited for the device, as after the all-reduce of metrics.
        """
        total = time.monotonic() - self._started
        seconds = dict.fromkeys(PHASES, 0.0)
        if self._on_cuda and self._starts:
            # The device may not have reached the last event yet: its phase began after the host waited.
            self._starts[-1].synchronize()
        for phase, (begin, end) in zip(self._phases, itertools.pairwise(self._starts), strict=False):
            seconds[phase] += begin.elapsed_time(end) / 1000 if self._on_cuda else end - begin
        seconds["other"] = 0.0
        seconds["other"] = total - sum(seconds.values())
        return seconds


class WorkClock:
    """Measures a run's time by kind of work; each moment counts as one kind, at first as `starting`.

    `started`: time of `time.monotonic`.
    """

    def __init__(self, processes: int, started: float):
        self._processes = processes
        self._marked = started
        self._work: Work = "starting"
        self._seconds: dict[str, float] = {}
        self._device_seconds = 0.0

    def resume(self, former: Mapping[str, Any]) -> None:
        """Add the time of earlier starts; `former` is a result of `read`."""
        for work, seconds in former["seconds"].items():
            self._seconds[work] = self._seconds.get(work, 0.0) + seconds
        self._device_seconds += former["device_seconds"]

    def enter(self, work: Work) -> None:
        """Count the time from now on as `work`."""
        now = time.monotonic()
        self._seconds[self._work] = self._seconds.get(self._work, 0.0) + now - self._marked
        self._device_seconds += (now - self._marked) * self._processes
        self._work = work
        self._marked = now

    @contextlib.contextmanager
    def measure(self, work: Work) -> Iterator[None]:
        """Count the time of the block as `work`, also inside a block of another work."""
        outer = self._work
        self.enter(work)
        try:
            yield
        finally:
            self.enter(outer)

    def read(self) -> dict[str, Any]:
        """Return the section `work` of summary.json: seconds by kind of work; all seconds times processes."""
        self.enter(self._work)
        return {
            "seconds": {work: round(seconds, 3) for work, seconds in self._seconds.items()},
            "device_seconds": round(self._device_seconds, 3),
        }
