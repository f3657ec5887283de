"""Train with everything that reports on a run: what `train`, a point of a sweep and the API start."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from dpo_dist.config.rules import check_needs
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.training.start.preflight import check_start, checked_start


def train_with_reports(
    config: RunConfig, on_row: Callable[[dict[str, float]], bool | None] | None = None
) -> int:
    """Train `config`, from its last checkpoint if there is one; return the exit code.

    `on_row`: see `api.train`; an exception of it ends the run at once.
    """
    check_needs(config, "train")
    stop = StopRequest(config.trainer.stop_after_steps, config.trainer.max_seconds)
    with stop.listening(), checked_start(config, trains=True) as console:
        # Slow, and what the imports print belongs in the log.
        from dpo_dist.tools.report.recorder import REPORTING, open_recorder  # noqa: PLC0415
        from dpo_dist.training.run import train  # noqa: PLC0415

        reporting = replace(REPORTING, open_recorder=partial(open_recorder, on_row=on_row))
        return train(config, console, stop, reporting)


def check_training(config: RunConfig, *, trains: bool = True) -> Iterator[str]:
    """Check everything that a run which trains, or only scores its pairs, needs before it uses a GPU."""
    check_start(config, trains=trains)
    from dpo_dist.tools.plan.plans import plan_in_brief  # noqa: PLC0415  (slow)
    from dpo_dist.training.start.check import dry_run  # noqa: PLC0415  (slow)

    yield dry_run(config, trains=trains, plan=plan_in_brief if trains else None)
