"""Wall-clock time of a step by phase."""

import itertools
import time

import torch

from dpo_dist.report.metrics_log import PHASES, Phase


class StepClock:
    """Seconds of one step by phase, from construction on.

    On CUDA, where the host only queues work, phases are timed between events in the device's stream; time
    that the device waits for the host is included. Elsewhere they are timed by the host's clock.
    """

    def __init__(self, device: torch.device):
        self._started = time.monotonic()
        self._on_cuda = device.type == "cuda"
        self._phases: list[Phase] = []
        self._seconds: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def enter(self, phase: Phase) -> None:
        """Start `phase`, which lasts until the next call; never waits for the device."""
        self._phases.append(phase)
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(time.monotonic())

    def stop(self) -> dict[Phase, float]:
        """Return the seconds of every phase; `other` is the rest, so that they add up to those of the step.

        Call it after the host has waited for the device, which the all-reduce of metrics makes it do.
        """
        total = time.monotonic() - self._started
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, duration in zip(self._phases, self._durations(), strict=False):
            seconds[phase] += duration
        seconds["other"] = 0.0
        seconds["other"] = total - sum(seconds.values())
        return seconds

    def _durations(self) -> list[float]:
        """Return the seconds from each `enter` to the next."""
        if self._on_cuda:
            if self._events:
                # The device may not have reached the last event yet: its phase began after the host waited.
                self._events[-1].synchronize()
            return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(self._events)]
        return [end - begin for begin, end in itertools.pairwise(self._seconds)]
