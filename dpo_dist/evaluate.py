"""Evaluate on pairs: `accelerate launch -m dpo_dist.evaluate +experiment=qwen7b evaluation.model=DIR`.

Takes the configuration of the training run. A model, an adapter or a checkpoint is scored on `data.eval`;
reference log-probs come from the store, and missing ones are stored.
"""

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.schema import RunConfig
from dpo_dist.training.startup import started


def main(config: RunConfig) -> int:
    """Write metrics with intervals, and the scores of every pair; return the exit code.

    Raises:
        DpoDistError: the model or the data cannot be read.
    """
    with started(config) as console:
        from dpo_dist.training.evaluate_model import evaluate_model  # noqa: PLC0415  (slow, prints into the log)

        return evaluate_model(config, console)


if __name__ == "__main__":
    run_verb(main)
