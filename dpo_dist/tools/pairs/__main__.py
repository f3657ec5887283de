"""Make preference records: `dpo-dist pairs pairs.method=scores data.train=[scored.jsonl] ...`.

`accelerate launch -m dpo_dist pairs ...` shares the work among processes. The same command again continues
after the finished parts. docs/pairs.md has a command for each method.
"""

import os
import sys

from dpo_dist.foundation.console import console_on, open_console
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.kit import RunConfig, RunFolder, run_verb
from dpo_dist.tools.pairs.rounds import run_rounds
from dpo_dist.tools.pairs.start import check_pairs
from dpo_dist.tools.sampling.keys import PairsConfig, PairsMethod


def main(config: RunConfig) -> int:
    """Write the preference records of `config.pairs`; return the exit code."""
    check_pairs(config)
    pairs = config.section_of(PairsConfig)
    # Rounds start the processes of their stages, and the other methods have no model.
    is_alone = bool(pairs.rounds) or pairs.method in (PairsMethod.scores, PairsMethod.people)
    if is_alone and os.environ.get("RANK", "0") != "0":
        return ExitCode.completed
    if pairs.rounds:
        return run_rounds(config, console_on(sys.stderr, config.console.style).say)
    with open_console(RunFolder(config.run.path).rank_log, config.console.style) as console:
        from dpo_dist.tools.pairs.make_pairs import make_pairs  # noqa: PLC0415  (slow, prints)

        make_pairs(config, console)
    return ExitCode.completed


if __name__ == "__main__":
    run_verb(main, verb="pairs")
