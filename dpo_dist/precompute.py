"""Fill the reference store and exit: `accelerate launch -m dpo_dist.precompute +experiment=qwen7b`.

Takes the configuration of the training run; only what the store lacks is computed.
"""

from pathlib import Path

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.schema import RunConfig
from dpo_dist.report.console import open_console


def main(config: RunConfig) -> int:
    """Score what the run of `config` needs; returns the exit code."""
    with open_console(Path(str(config.run.dir))) as console:
        from dpo_dist.training.assemble import precompute  # noqa: PLC0415  (heavy; prints go to the log)

        return precompute(config, console)


if __name__ == "__main__":
    run_verb(main)
