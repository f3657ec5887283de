"""Start another verb of this program as a command, and pass signals to stop on to it."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from dpo_dist.foundation.process import outside_of_launch
from dpo_dist.foundation.signals import LAUNCHER_VARIABLE, stop_signals
from dpo_dist.foundation.streams import output_descriptor


def launcher_command() -> str:
    """Return the words before `-m dpo_dist VERB`: this Python, or `dpo-dist launch` for several GPUs."""
    import torch  # noqa: PLC0415  (slow, and only needed here)

    python = shlex.quote(sys.executable)
    return f"{python} -m dpo_dist launch" if torch.cuda.device_count() > 1 else python


def run_command(command: str, screen: Path | None = None) -> tuple[int, list[int]]:
    """Run a command to its end; return its exit code, and the signals to stop that it was passed.

    `screen`: the file that gets what the command prints.
    """
    received: list[int] = []
    with contextlib.ExitStack() as stack:
        output = output_descriptor()
        errors = None
        if screen is not None:
            screen.parent.mkdir(parents=True, exist_ok=True)
            output = errors = stack.enter_context(screen.open("ab")).fileno()
        # In a session of its own: else Ctrl-C would reach the command twice, directly and from here.
        process = subprocess.Popen(  # noqa: S603  (this program)
            shlex.split(command),
            stdout=output,
            stderr=errors,
            env={**outside_of_launch(os.environ), LAUNCHER_VARIABLE: str(os.getpid())},
            start_new_session=True,
        )

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):  # the command has just ended
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code, received
