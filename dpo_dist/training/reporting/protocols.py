"""Interfaces of a run's reports: the verb `train` passes them in, so that training imports no tools."""

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
    """Records a run, on rank 0. A bug in a report gives a warning and does not end the run."""

    @property
    def metrics(self) -> MetricsLog:
        """The rows so far."""

    def row(self, row: MetricsRow, margins: PairColumn | None = None) -> None:
        """Record one metrics row, of an evaluation with the margins of its pairs."""

    def evaluation(self, means: dict[str, float], values: PairValues, inputs: Inputs) -> None:
        """Write the files of the evaluation after the last step."""

    def close(self, summary: Mapping[str, Any], outcome: RunOutcome) -> None:
        """Write the run's report and print how the run ended; `summary` is without `exit`."""

    def close_on_error(self) -> AbstractContextManager[None]:
        """If the block raises or is interrupted, end tracking within a few seconds."""


class Samples(Protocol):
    """Writes the policy's responses at evaluations. Methods are collective."""

    def open(self, policy: Engine) -> None:
        """Generate missing responses of the reference with the policy, which starts as the reference."""

    def write_responses(self, step: int, policy: Engine, *, is_last: bool) -> dict[str, float]:
        """Write the responses after `step` and return their metrics; `is_last`: the run ends after it."""


@dataclass(frozen=True)
class Reporting:
    """Functions that a verb passes in so that training can report: recorder, model card, samples, page."""

    open_recorder: Callable[[Run, MetricsLog], Recorder]
    run_card: Callable[..., str]  # returns the text of the model card
    prepare_samples: Callable[[Run, Inputs, int], Samples | None]  # called before a model is loaded
    write_page: Callable[[RunFolder], object]
