"""Interfaces of what follows a run: the verb `train` passes them in, so that training imports no tools."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.zero import Engine
from dpo_dist.foundation.types import Fields
from dpo_dist.objective.metrics import PairValues
from dpo_dist.training.reporting.metrics_log import MetricsRow
from dpo_dist.training.start.inputs import Inputs
from dpo_dist.training.start.open_run import Run


class Samples(Protocol):
    """Writes the policy's responses at evaluations. Methods are collective."""

    def open(self, policy: Engine) -> None:
        """Generate missing responses of the reference with the policy, which starts as the reference."""

    def write_responses(self, step: int, policy: Engine, *, is_last: bool) -> dict[str, float]:
        """Write the responses after `step` and return their metrics; `is_last`: the run ends after it."""


class Ask(StrEnum):
    """What a function of the user asks for after a step: a metrics row, a checkpoint, or the end."""

    log = "log"
    save = "save"
    stop = "stop"


@dataclass(frozen=True)
class StepDone:
    """A step after its update of the weights, and where the run is."""

    step: int  # steps done
    steps: int  # of the run
    epoch: float  # epochs done
    policy: Engine


OnStep = Callable[[StepDone], Ask | None]
OnRow = Callable[[MetricsRow], bool | None]
"""Called with each metrics row after it is recorded; if it returns true, the run stops."""


def _plain_end(folder: RunFolder, _rows: list[MetricsRow], summary: Fields) -> tuple[Fields, list[str]]:
    return {}, [f"{summary['exit']}: {folder.summary}"]


@dataclass(frozen=True)
class Reporting:
    """Functions that report on a run beside its metrics and trackers: by themselves they add nothing.

    `prepare_samples` is called on all ranks, before a model is loaded, the others on rank 0. `check_row` gets
    the evaluations so far, and returns the next row with what it says of the row's samples. `closing_verdict`
    returns what the summary gets, and lines about it; `write_report`, called when the summary is written,
    returns lines, too.
    """

    on_row: OnRow | None = None
    on_step: OnStep | None = None
    prepare_samples: Callable[[Run, Inputs, int], Samples | None] = lambda *_: None
    sent_samples: Callable[[RunConfig], int] = lambda _: 0  # texts that may go to a server
    check_row: Callable[[Run, list[MetricsRow], MetricsRow], MetricsRow] = lambda _run, _rows, row: row
    write_worst: Callable[[Run, Inputs, PairValues], object] = lambda *_: None
    closing_verdict: Callable[[RunFolder, list[MetricsRow], Fields], tuple[Fields, list[str]]] = _plain_end
    run_card: Callable[..., str] = lambda *_, **__: ""  # returns the text of the model card
    write_page: Callable[[RunFolder], object] = lambda _: None
    write_report: Callable[[Run, list[MetricsRow], Fields], list[str]] = lambda *_: []
