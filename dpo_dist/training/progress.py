"""Progress of the training steps on the console: means over the steps since it was last shown."""

import time

import torch

from dpo_dist.distributed.device_memory import peak_memory_bytes
from dpo_dist.model.flops import PeakFlops
from dpo_dist.report.terminal.console import Console
from dpo_dist.report.terminal.progress import TrainingStatus
from dpo_dist.training.log_window import LogWindow, StepMeasures


class Progress:
    """Shows the steps of one start of a run.

    Args:
        console: to show them on.
        steps: of the whole run.
        peaks: floating-point operations per second of all devices.
        device: of this process, for its memory.
    """

    def __init__(self, console: Console, steps: int, peaks: PeakFlops, device: torch.device):
        self._console = console
        self._steps = steps
        self._peaks = peaks
        self._device = device
        self._window = LogWindow()
        self._first: tuple[int, float] | None = None

    def add(self, step: int, measures: StepMeasures, *, must_stop: bool) -> None:
        """Add a step that is done; the first and the last one of a start are always shown."""
        is_first, is_last = self._first is None, must_stop or step == self._steps
        if self._first is None:
            # Without the first step, which compiles kernels and allocates memory.
            self._first = step, time.monotonic()
        self._window.add(measures)
        if is_first or is_last or self._console.is_due():
            row = self._window.row(self._peaks)
            row["memory/peak_bytes"] = peak_memory_bytes(self._device)
            status = TrainingStatus(step, self._steps, row, self._seconds_left(step, *self._first))
            self._console.training(status, always=is_first or is_last)
            self._window = LogWindow()

    def _seconds_left(self, step: int, first: int, since: float) -> float | None:
        """Estimate the remaining time from that of the steps so far, with evaluations and checkpoints."""
        if step == first:
            return None
        return (time.monotonic() - since) / (step - first) * (self._steps - step)
