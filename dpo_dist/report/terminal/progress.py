"""Progress of a run in words: of the training steps, and of other work such as encoding."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dpo_dist.number_text import counted, duration, percent, size

GAP = "  "
"""Between the parts of a line."""

_EVALUATED: Mapping[str, Callable[[float], str]] = {
    "eval_loss": "loss {:.4f}".format,
    "eval_rewards/accuracies": "accuracy {:.3f}".format,
    "eval_rewards/margins": "margin {:.3f}".format,
    "eval_pairs_per_second": "{:,.1f} pairs/s".format,
    "eval_samples/length": "samples of {:,.0f} tokens".format,
    "eval_samples/finished": lambda share: f"{percent(share)} of them finished",
}


@dataclass(frozen=True)
class Part:
    """A part of a line; on a narrow screen, parts of the highest `rank` are omitted first."""

    text: str
    rank: int


@dataclass(frozen=True)
class TrainingStatus:
    """The state of the training after a step.

    Attributes:
        step: steps done.
        steps: of the whole run.
        values: metrics, as in a metrics row; absent ones are not shown.
        seconds_left: estimated; None if unknown.
    """

    step: int
    steps: int
    values: Mapping[str, float]
    seconds_left: float | None = None

    @property
    def share(self) -> float:
        """The share of the steps that are done."""
        return self.step / self.steps

    def parts(self) -> list[Part]:
        """Return the parts of the line."""
        shown: tuple[tuple[str, Callable[[float], str], int], ...] = (
            ("loss", "loss {:.4f}".format, 1),
            ("rewards/accuracies", "accuracy {:.2f}".format, 2),
            ("rewards/margins", "margin {:.3f}".format, 4),
            ("pairs_per_second", "{:,.1f} pairs/s".format, 5),
            ("mfu", lambda share: f"MFU {percent(share)}", 6),
        )
        values = self.values
        found = [Part(words(values[name]), rank) for name, words, rank in shown if name in values]
        if (peak := values.get("memory/peak_bytes")) is not None:
            found.append(Part(size(peak), 7))
        if self.seconds_left is not None and self.step < self.steps:
            found.append(Part(f"{duration(self.seconds_left)} left", 3))
        return [Part(f"step {self.step:,}/{self.steps:,}", 0), *found]


@dataclass
class Work:
    """Progress of work that is no training step.

    Attributes:
        title: "encoding train data".
        unit: singular of the units counted.
        started: `time.monotonic()` at the first count.
        done: units done.
        share: of all work that is done, from 0 to 1; None if unknown.
        total: units in all; None if unknown.
    """

    title: str
    unit: str
    started: float
    done: int = 0
    share: float | None = None
    total: int | None = None

    def parts(self) -> list[Part]:
        """Return the parts of the line."""
        seconds = time.monotonic() - self.started
        amount = counted(self.done, self.unit) if self.total is None else self._of_total(self.total)
        found = [Part(f"{self.title}: {amount}", 0)]
        if self.share is not None:
            found.append(Part(percent(self.share), 2))
        if self.done > seconds >= 1:
            found.append(Part(f"{self.done / seconds:,.0f} a second", 3))
        if self.share and self.share < 1 and seconds >= 1:
            found.append(Part(f"{duration(seconds / self.share - seconds)} left", 1))
        return found

    def _of_total(self, total: int) -> str:
        return f"{self.done:,} of {counted(total, self.unit)}"


def fitting(parts: list[Part], width: int) -> list[str]:
    """Return the texts of the parts that fit into `width` columns; the first part is always among them."""
    kept = sorted(parts, key=lambda part: part.rank)
    while len(kept) > 1 and len(GAP.join(part.text for part in kept)) > width:
        kept.pop()
    return [part.text for part in parts if part in kept]


def describe_evaluation(row: Mapping[str, float], steps: int) -> str:
    """Return the line about a metrics row of an evaluation: "step 100/1,000  evaluation: loss 0.6, ..."."""
    parts = [words(row[name]) for name, words in _EVALUATED.items() if name in row]
    return f"step {int(row['step']):,}/{steps:,}  evaluation: {', '.join(parts)}"
