"""Fill the reference store and exit: `accelerate launch -m dpo_dist.precompute +experiment=qwen7b`.

Takes the configuration of the training run; only what the store lacks is computed.
"""

import logging
import sys

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.report.console import open_console
from dpo_dist.training.startup import check_start, without_traces


def main(config: RunConfig) -> int:
    """Score what the run of `config` needs; returns the exit code."""
    _check_mode(config)
    with without_traces(config):
        check_start(config)
        with open_console(RunFolder.of(config).path) as console:
            # Heavy, and what it prints goes to the log.
            from dpo_dist.training.run import precompute  # noqa: PLC0415

            return precompute(config, console)


def check(config: RunConfig) -> int:
    """Look at all that the run of `config` needs before its first GPU second; returns the exit code."""
    _check_mode(config)
    with without_traces(config, of_success=True):
        check_start(config)
        logging.disable(logging.WARNING)
        from dpo_dist.training.preflight import rehearse  # noqa: PLC0415  (heavy)

        sys.stdout.write(rehearse(config))
    return 0


def _check_mode(config: RunConfig) -> None:
    if config.reference.mode is not ReferenceMode.cached:
        raise ConfigError(
            "only a stored reference can be precomputed",
            where="reference.mode",
            got=f"{config.reference.mode} with {', '.join(config.loss.kinds)}",
            expected="cached",
            remedy="set reference=cached, with a loss that needs a reference",
        )


if __name__ == "__main__":
    run_verb(main, check)
