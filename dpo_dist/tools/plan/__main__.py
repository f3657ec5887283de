"""Compute the memory and hours of a run before it starts: `dpo-dist plan +experiment=qwen7b plan.gpus=8`.

Takes the configuration of the run; needs no weights and no GPU. Local data are encoded into `data.cache`,
where training finds them, unless `plan.pairs` and `plan.tokens_per_pair` are set. The last line has settings
that fit and have the shortest epoch. Exit code 1: the run does not fit.
"""

import os
import sys

from dpo_dist.foundation.console import console_on, warnings_off
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.kit import RunConfig, run_verb


def main(config: RunConfig) -> int:
    """Print the plan of `config`; return the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings_off():
        from dpo_dist.tools.plan.make_plan import make_plan  # noqa: PLC0415  (slow)

        plan = make_plan(config, console_on(sys.stderr, config.console.style).progress)
    console_on(sys.stdout, config.console.style).result("plan", plan.content, plan.lines)
    return ExitCode.completed if plan.fits else ExitCode.findings


if __name__ == "__main__":
    run_verb(main, verb="plan")
