"""Fill the reference store and exit: `accelerate launch -m dpo_dist precompute +experiment=qwen7b`.

Takes the configuration of the training run, or reads it from `run.dir`. Computes only missing log-probs.
"""

from dpo_dist.foundation.signals import StopRequest, end_at_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds, on a network file system more

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.rules import check_rules, needs_of
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.types import CheckReport
from dpo_dist.training.start.preflight import check_start, checked_console


def main(config: RunConfig) -> int:
    """Store the reference log-probs that a run with this configuration needs; return the exit code."""
    check_rules(config, needs_of("precompute"))
    stop = StopRequest(max_seconds=config.trainer.max_seconds)
    with stop.listening(), checked_console(config) as console:
        from dpo_dist.training.reference import precompute  # noqa: PLC0415  (slow)

        return precompute(config, console, stop)


def check(config: RunConfig) -> CheckReport:
    """Check everything that `main` needs before it uses a GPU."""
    check_start(config)
    from dpo_dist.training.start.dry_run import dry_run  # noqa: PLC0415  (slow)

    return dry_run(config, trains=False)


if __name__ == "__main__":
    run_verb(main, check, verb="precompute")
