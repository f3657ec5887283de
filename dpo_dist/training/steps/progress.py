"""Show training on the screen: steps, evaluations, and rows for programs."""

import time
from collections.abc import Mapping

import torch

from dpo_dist.config.metrics import ACCURACIES, MAIN, METRICS, PREFIX
from dpo_dist.distributed.memory import peak_memory_bytes
from dpo_dist.foundation.console import TRAINING, Console
from dpo_dist.foundation.text import duration, percent, size
from dpo_dist.training.steps.state import LogWindow

_IN_LINE = ("rewards/margins", "pairs_per_second", "mfu")


class Progress:
    """Shows the steps of one start of a run of `steps`, at least the first and the last one."""

    def __init__(self, console: Console, steps: int, peak: float, device: torch.device, unit: str):
        self._console, self._steps, self._peak, self._device = console, steps, peak, device
        self._unit = unit  # `LossConfig.unit`
        self._window = LogWindow()
        self._first: tuple[int, float] | None = None

    def add(self, step: int, measures: LogWindow, *, must_stop: bool) -> None:
        """Add a finished step, and show the progress if it is due."""
        is_first, is_last = self._first is None, must_stop or step == self._steps
        if self._first is None:
            # The first step does not count: compiling kernels would make the time left too long.
            self._first = step, time.monotonic()
        self._window.add(measures)
        if not (is_first or is_last or self._console.is_due()):
            return
        first, since = self._first
        left = (time.monotonic() - since) / (step - first) * (self._steps - step) if step > first else None
        row = self._window.row(self._peak) | {"memory/peak_bytes": peak_memory_bytes(self._device)}
        if self._device.type == "cpu":  # of no use on a CPU
            del row["mfu"]
        show_step(self._console, step, self._steps, row, left, self._unit, always=is_first or is_last)
        self._window = LogWindow()


def show_step(
    console: Console,
    step: int,
    steps: int,
    values: Mapping[str, float],
    seconds_left: float | None = None,
    unit: str = "pair",
    *,
    always: bool = False,
) -> None:
    """Show the progress if it is due, or `always`; `values` are those of a metrics row.

    A narrow terminal cuts the end of the line, so that the most important values come first.
    """
    parts = [f"step {step:,}/{steps:,}"]
    parts += [_in_words(name, values[name]) for name in ("loss", *ACCURACIES) if name in values]
    if seconds_left is not None and step < steps:
        parts.append(f"{duration(seconds_left)} left")
    parts += [_in_words(name, values[name], unit) for name in _IN_LINE if name in values]
    if (peak := values.get("memory/peak_bytes")) is not None:
        parts.append(size(peak))
    content = {"work": TRAINING, "unit": "step", "done": step, "total": steps, "share": step / steps}
    console.show_progress({**content, "seconds_left": seconds_left}, "  ".join(parts), always=always)


def show_row(console: Console, row: Mapping[str, float], steps: int, unit: str = "pair") -> None:
    """Show a metrics row of a run of `steps`; people see rows of evaluations only, programs all rows."""
    if not any(name.startswith(PREFIX) for name in row):
        console.result("step", row, [])
        return
    measured = (name for name in (*MAIN, "pairs_per_second") if PREFIX + name in row)
    parts = [_in_words(name, row[PREFIX + name], unit) for name in measured]
    if (length := row.get("eval_samples/length")) is not None:
        parts.append(f"samples of {length:,.0f} tokens")
    if (finished := row.get("eval_samples/finished")) is not None:
        parts.append(f"{percent(finished)} of them finished")
    line = f"step {int(row['step']):,}/{steps:,}  evaluation: {', '.join(parts)}"
    console.result("evaluation", row, [line])


def _in_words(name: str, value: float, unit: str = "pair") -> str:
    """Return a value with its name or unit: "loss 0.6931", "MFU 41 %", "161.7 pairs/s"."""
    metric = METRICS[name]
    if name == "pairs_per_second":
        return f"{metric.form(value)} {unit}s/s"
    return f"{metric.title} {metric.form(value)}"
