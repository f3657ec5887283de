"""Start another verb of this program with a configuration of its own, and wait for its end."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from dpo_dist.config.load import to_yaml
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError, ExitCode, first_line
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.signals import stop_signals
from dpo_dist.foundation.streams import output_descriptor

_REASONS = (ExitCode.invalid, ExitCode.diverged, ExitCode.preempted)


def command_of(verb: str, config: RunConfig, folder: Path, launcher: str | None) -> str:
    """Write `config`, without secrets, below `folder`; return the command that runs the verb with it.

    By default `dpo-dist launch` starts it, if there are several GPUs.
    """
    write_text(folder / "experiment" / "round.yaml", to_yaml(config))
    if launcher is None:
        import torch  # noqa: PLC0415  (slow, and only needed here)

        several = torch.cuda.device_count() > 1
        launcher = shlex.quote(sys.executable) + (" -m dpo_dist launch" if several else "")
    return f"{launcher} -m dpo_dist {verb} --config-dir {shlex.quote(str(folder))} +experiment=round"


def run_command(command: str) -> int:
    """Run a command to its end and return its exit code; signals to stop are passed on to it."""
    received: list[int] = []
    try:
        # In a session of its own, Ctrl-C reaches this process alone, which passes it on once.
        process = subprocess.Popen(  # noqa: S603  (the user's own launcher)
            shlex.split(command), stdout=output_descriptor(), start_new_session=True
        )
    except (OSError, ValueError) as fault:  # no such program; a quote that is not closed
        raise ConfigError(
            "the launcher cannot be started",
            where="pairs.launcher",
            got=f"{command}: {first_line(fault)}",
            remedy="set it to the words before -m dpo_dist.train, such as 'dpo-dist launch'",
        ) from None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received and code not in _REASONS:
        raise SystemExit(128 + received[0])  # as shells number it
    return code
