"""The clock of the phases of a step."""

import itertools
import time
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # pages of runs read the names below, and need no torch
    import torch

Phase = Literal["data", "reference", "forward", "backward", "optimizer", "checkpoint", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)  # of a step, with the key `time/<phase>` in a metrics row


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
