"""Train: `accelerate launch -m dpo_dist.train +experiment=qwen7b`.

The same command again resumes the run. Exit codes: 0 completed, 2 configuration or data error, 3 diverged, 75
stopped with a checkpoint.
"""

from pathlib import Path

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.schema import RunConfig
from dpo_dist.report.console import open_console


def main(config: RunConfig) -> int:
    """Train as `config` says; returns the exit code."""
    with open_console(Path(str(config.run.dir))) as console:
        from dpo_dist.training.assemble import train  # noqa: PLC0415  (heavy; what it prints goes to the log)

        return train(config, console)


if __name__ == "__main__":
    run_verb(main)
