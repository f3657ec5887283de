"""Evaluate a run on pairs: `dpo-dist evaluate run.dir=output/a 'evaluation.data=[hard.jsonl]'`.

Takes the configuration of the training run, or finds it in `run.dir`. A model, an adapter or a checkpoint is
scored on `data.eval` or `evaluation.data`; reference log-probs come from the store, and missing ones are
stored.
"""

from collections.abc import Iterator

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.schema import RunConfig
from dpo_dist.training.start.named_models import find_evaluated
from dpo_dist.training.start.preflight import check_start, checked_start


def main(config: RunConfig) -> int:
    """Write metrics with intervals, and the scores of every pair; return the exit code."""
    config, models = find_evaluated(config)
    with checked_start(config) as console:
        from dpo_dist.tools.evaluation.models import evaluate_models  # noqa: PLC0415  (slow, prints into the log)

        return evaluate_models(config, models, console)


def check(config: RunConfig) -> Iterator[str]:
    """Check everything that `main` needs before it uses a GPU."""
    config, models = find_evaluated(config)
    check_start(config)
    from dpo_dist.training.start.check import dry_run  # noqa: PLC0415  (slow)

    yield dry_run(config, models)


if __name__ == "__main__":
    run_verb(main, check, verb="evaluate")
