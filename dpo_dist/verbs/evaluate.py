"""Evaluate a run on pairs: `dpo-dist evaluate run.dir=output/a 'evaluation.data=[hard.jsonl]'`.

Takes the configuration of the training run, or reads it from `run.dir`. Scores models, adapters and
checkpoints on `data.eval` or `evaluation.data`. Reference log-probs come from the store; missing ones are
computed and stored.
"""

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.types import CheckReport
from dpo_dist.training.start.named_models import find_evaluation_models
from dpo_dist.training.start.preflight import check_start, checked_console


def main(config: RunConfig) -> int:
    """Write metrics with confidence intervals, and the scores of every pair; return the exit code."""
    config, models = find_evaluation_models(config)
    with checked_console(config) as console:
        from dpo_dist.training.evaluation.models import evaluate_models  # noqa: PLC0415  (slow, prints into the log)

        return evaluate_models(config, models, console)


def check(config: RunConfig) -> CheckReport:
    """Check everything that `main` needs before it uses a GPU."""
    config, models = find_evaluation_models(config)
    check_start(config)
    from dpo_dist.training.start.dry_run import dry_run  # noqa: PLC0415  (slow)

    return dry_run(config, models)


if __name__ == "__main__":
    run_verb(main, check, verb="evaluate")
