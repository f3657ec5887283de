"""Train: `accelerate launch -m dpo_dist.train +experiment=qwen7b`.

The same command again resumes the run; `--check` only looks whether it could start. Exit codes: 0 completed,
2 configuration or data error, 3 diverged, 75 stopped with a checkpoint.
"""

import logging
import sys

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.report.console import open_console
from dpo_dist.training.startup import check_start, without_traces


def main(config: RunConfig) -> int:
    """Train as `config` says; returns the exit code."""
    with without_traces(config):
        check_start(config)
        with open_console(RunFolder.of(config).path) as console:
            # Heavy, and what it prints goes to the log.
            from dpo_dist.training.run import train  # noqa: PLC0415

            return train(config, console)


def check(config: RunConfig) -> int:
    """Look at all that the run of `config` needs before its first GPU second; returns the exit code."""
    with without_traces(config, of_success=True):
        check_start(config)
        logging.disable(logging.WARNING)
        from dpo_dist.training.preflight import rehearse  # noqa: PLC0415  (heavy)

        sys.stdout.write(rehearse(config))
    return 0


if __name__ == "__main__":
    run_verb(main, check)
