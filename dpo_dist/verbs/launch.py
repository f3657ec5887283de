"""Start a verb on several processes: `dpo-dist launch train +experiment=qwen7b`.

Takes the arguments of `accelerate launch`. Unlike that command, exits with the run's exit code, prints no
traceback of its own, and gives a stopped run time to save.
"""

import sys
from collections.abc import Sequence

from dpo_dist.foundation.errors import ErrorPrinter, ExitCode, exit_after
from dpo_dist.foundation.signals import end_at_signals
from dpo_dist.foundation.streams import print_line

_OPTIONS = """
usage: dpo-dist launch [OPTION ...] VERB ARGUMENT ...

  --num_processes N         processes on all nodes, one for each GPU (default: one for each GPU here)
  --gpu_ids 0,1             the GPUs of this node to use
  --num_machines N          nodes; each starts this command
  --machine_rank N          number of this node, from 0
  --main_process_ip ADDRESS, --main_process_port PORT
                            the address of node 0, a free port there
  --config_file FILE        a file of these options, as in launch/accelerate

accelerate launch --help lists the others; dpo-dist VERB --help has the verb's arguments"""


def main(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; return the exit code."""
    if arguments[:1] in (["-h"], ["--help"]):  # accelerate's own text would need torch
        print_line((__doc__ or "") + _OPTIONS)
        return ExitCode.completed
    from dpo_dist.distributed.processes.launcher import launch  # noqa: PLC0415  (slow)

    return launch(arguments)


if __name__ == "__main__":
    end_at_signals()  # the import takes seconds
    exit_after(lambda: main(sys.argv[1:]), ErrorPrinter(is_document=False))  # `--json` is the verb's
