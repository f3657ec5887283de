"""Wall-clock time of a step by phase."""

import itertools
import time

import torch

from dpo_dist.report.metrics_log import PHASES, Phase


class StepClock:
    """Seconds of one step by phase, from its making on.

    On CUDA, where the host only queues work, a phase lasts as the device sees it: between events in its
    stream, which it reaches late where it had to wait for the host. Elsewhere the host's clock counts.
    """

    def __init__(self, device: torch.device):
        self._started = time.monotonic()
        self._on_cuda = device.type == "cuda"
        self._phases: list[Phase] = []
        self._seconds: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def enter(self, phase: Phase) -> None:
        """The time from here to the next call is of `phase`; never waits for the device."""
        self._phases.append(phase)
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(time.monotonic())

    def stop(self) -> dict[Phase, float]:
        """Seconds of every phase up to now; `other` is what no phase had, so that they add up to the step's.

        To be called after the host has waited for the device, as the sum of metrics over ranks makes it.
        """
        total = time.monotonic() - self._started
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, duration in zip(self._phases, self._durations(), strict=False):
            seconds[phase] += duration
        seconds["other"] = 0.0
        seconds["other"] = total - sum(seconds.values())
        return seconds

    def _durations(self) -> list[float]:
        """From each entry to the next."""
        if self._on_cuda:
            if self._events:
                # The last phases may have begun after the host's wait, and be recorded only now.
                self._events[-1].synchronize()
            return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(self._events)]
        return [end - begin for begin, end in itertools.pairwise(self._seconds)]
