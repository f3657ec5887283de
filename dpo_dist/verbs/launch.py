"""Start a verb on several processes: `dpo-dist launch train +experiment=qwen7b`.

Takes the arguments of `accelerate launch`. Unlike that command, exits with the run's exit code, prints no
traceback of its own, and gives a stopped run time to save.
"""

import sys

from dpo_dist.foundation.errors import ErrorPrinter, exit_after
from dpo_dist.foundation.signals import end_at_signals

if __name__ == "__main__":
    end_at_signals()  # the import takes seconds
    from dpo_dist.distributed.processes.launcher import launch

    exit_after(lambda: launch(sys.argv[1:]), ErrorPrinter(is_document=False))  # `--json` is the verb's
