"""Interfaces of what follows a run: the verb `train` passes them in, so that training imports no tools."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
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


class When(StrEnum):
    """A point of the training loop at which a function of the user is called, on rank 0.

    `start`: before the first step of this start. `before_step`, `after_step`: around the update of the
    weights. `recorded`: the rows of a step, or of its evaluation, are written. `epoch_end`: after the rows of
    a step that ends an epoch. `saved`: a checkpoint is committed, at times a few steps later.
    """

    start = "start"
    before_step = "before_step"
    after_step = "after_step"
    recorded = "recorded"
    epoch_end = "epoch_end"
    saved = "saved"


class Wish(StrEnum):
    """What such a function asks of the step at hand: a row, an evaluation, a checkpoint, to be the last."""

    log = "log"
    evaluate = "evaluate"
    save = "save"
    stop = "stop"


@dataclass(frozen=True)
class Moment:
    """A point of the loop, and where the run is; at `saved`, where it was when it saved."""

    when: When
    step: int  # steps done
    steps: int  # of the run
    epoch: float  # epochs done
    policy: Engine


OnMoment = Callable[[Moment], Collection[Wish]]


@dataclass(frozen=True)
class Reporting:
    """Functions that a verb passes in so that training can report: recorder, model card, samples, page.

    `on_moment`, which follows the loop, is there on all ranks or on none.
    """

    open_recorder: Callable[[Run, MetricsLog], Recorder]
    run_card: Callable[..., str]  # returns the text of the model card
    prepare_samples: Callable[[Run, Inputs, int], Samples | None]  # called before a model is loaded
    write_page: Callable[[RunFolder], object]
    on_moment: OnMoment | None = None
