"""Interfaces of what reports on a run: training does not import it, the verb `train` passes it in."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.distributed.zero import Engine
from dpo_dist.foundation.errors import RunOutcome
from dpo_dist.objective.metrics import PairColumn, PairValues
from dpo_dist.training.reporting.metrics_log import MetricsLog, MetricsRow
from dpo_dist.training.start.inputs import Inputs
from dpo_dist.training.start.open_run import Run


class Recorder(Protocol):
    """Records a run, on rank 0. A bug in a report is a warning, and ends no run."""

    @property
    def metrics(self) -> MetricsLog:
        """The rows so far."""

    def row(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Record one metrics row; an evaluation's row comes with its margins."""

    def evaluation(self, means: dict[str, float], values: PairValues, inputs: Inputs) -> None:
        """Write the files of the evaluation after the last step."""

    def close(self, summary: Mapping[str, Any], outcome: RunOutcome) -> None:
        """Write the report of a run and print how it ended; `summary`: without `exit`."""

    def closed_by_errors(self) -> AbstractContextManager[None]:
        """If the block ends in error or is interrupted, end tracking in a few seconds."""


class Samples(Protocol):
    """Responses of the policy at evaluations. Methods are collective."""

    def open(self, policy: Engine) -> None:
        """Ask the policy, at its start, for the reference's responses if they are not known."""

    def at(self, step: int, policy: Engine, *, is_last: bool) -> dict[str, float]:
        """Write the responses after `step`, the run's last one if `is_last`; return their metrics."""


@dataclass(frozen=True)
class Reporting:
    """What a verb passes in so that training can report: recorder, model card, samples, page."""

    open_recorder: Callable[[Run, MetricsLog], Recorder]
    run_card: Callable[..., str]  # the model card
    prepare_samples: Callable[[Run, Inputs, int], Samples | None]  # before a model is loaded
    write_page: Callable[[RunFolder], object]
