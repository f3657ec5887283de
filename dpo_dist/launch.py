"""Start a verb on several processes: `python -m dpo_dist.launch -m dpo_dist.train +experiment=qwen7b`.

Takes the arguments of `accelerate launch`. It ends with the exit code of the run, without a traceback, and
gives a run that is stopped the time to save.
"""

import contextlib
import os
import sys

from dpo_dist.foundation.process import end_at_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds


def main(arguments: list[str]) -> int:
    """Run a verb on the processes that `arguments` ask for; return its exit code."""
    from dpo_dist.distributed.launcher import launch  # noqa: PLC0415  (slow)

    return launch(arguments)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal may be closed
            stream.flush()
    os._exit(exit_code)
