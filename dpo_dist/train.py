"""Train: `accelerate launch -m dpo_dist.train +experiment=qwen7b`.

The same command again resumes the run. `--check` only checks that the run can start; `--help KEY` explains a
key.
"""

from collections.abc import Callable
from typing import Any

from dpo_dist.foundation.signals import StopRequest, end_at_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds, on a network file system more

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.extensions import hook
from dpo_dist.config.rules import check_rules, needs_of
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.types import CheckReport
from dpo_dist.training.start.preflight import check_start, checked_console


def main(
    config: RunConfig,
    on_row: Callable[[dict[str, float]], bool | None] | None = None,
    on_step: Callable[[Any], Any] | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Train `config`, from its last checkpoint if there is one; return the exit code.

    `on_row`, `on_step`: see `api.train`; an exception that they raise ends the run at once.
    """
    check_rules(config, needs_of("train"))
    stop = stop or StopRequest(config.trainer.stop_after_steps, config.trainer.max_seconds)
    with stop.listening(), checked_console(config, trains=True) as console:
        # Slow, and the log must have what these imports print.
        from dpo_dist.training.reporting.protocols import Reporting  # noqa: PLC0415
        from dpo_dist.training.run import train  # noqa: PLC0415

        reporting = hook("reporting") or Reporting
        return train(config, console, stop, reporting(on_row, on_step))


def check(config: RunConfig) -> CheckReport:
    """Check everything that training needs before it uses a GPU."""
    check_start(config, trains=True)
    from dpo_dist.training.start.dry_run import dry_run  # noqa: PLC0415  (slow)

    return dry_run(config)


if __name__ == "__main__":
    run_verb(main, check, verb="train")
