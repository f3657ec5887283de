"""Train: `accelerate launch -m dpo_dist.train +experiment=qwen7b`.

The same command again resumes the run; `--check` checks that it can start; `--help KEY` explains a key.
"""

from collections.abc import Callable, Iterator

from dpo_dist.foundation.signals import end_at_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds, on a network file system more

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.schema import RunConfig
from dpo_dist.tools.report.training import check_training, train_with_reports


def main(config: RunConfig, on_row: Callable[[dict[str, float]], bool | None] | None = None) -> int:
    """Train `config`, from its last checkpoint if there is one; return the exit code.

    `on_row`: see `api.train`.
    """
    return train_with_reports(config, on_row)


def check(config: RunConfig) -> Iterator[str]:
    """Check everything that a training needs before it uses a GPU."""
    return check_training(config)


if __name__ == "__main__":
    run_verb(main, check, verb="train")
