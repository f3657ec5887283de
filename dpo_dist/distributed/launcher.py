"""`accelerate launch`, with the exit code of the run and time for its last checkpoint."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dpo_dist.errors import ConfigError, ExitCode
from dpo_dist.signals import stop_signals


def launch(arguments: Sequence[str]) -> int:
    """Start processes as `accelerate launch` does, and return the exit code of the first one that failed.

    Signals are passed on to the processes, which save and end by themselves: torch's own launcher would kill
    them after 30 seconds. A process that was killed by a signal counts as 128 + its number.

    Args:
        arguments: of `accelerate launch`.
    """
    parsed = launch_command_parser().parse_args(list(arguments))
    if parsed.config_file is not None and not Path(parsed.config_file).is_file():
        return _refused("the launcher's file does not exist", "--config_file", parsed.config_file)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGQUIT")  # of torch's launcher
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in stop_signals():
        signal.signal(number, _pass_on)
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(failure.exitcode, f"rank {rank}")
    except subprocess.CalledProcessError as error:
        return _code(error.returncode, "the process")
    except ValueError as error:
        return _refused("accelerate cannot start processes with these options", "command line", str(error))
    return ExitCode.completed


def _refused(message: str, where: str, got: str) -> int:
    remedy = "use a file of launch/accelerate; python -m dpo_dist.launch --help explains the options"
    error = ConfigError(message, where=where, got=got, remedy=remedy)
    sys.stderr.write(f"{error.block()}\n")
    return error.exit_code


def _code(of_process: int, name: str) -> int:
    if of_process >= 0:
        return of_process
    sys.stderr.write(f"{name} was ended by {signal.Signals(-of_process).name}\n")
    return 128 - of_process


def _pass_on(number: int, _frame: FrameType | None) -> None:
    children = psutil.Process().children()
    if not children:  # none has started yet
        os._exit(ExitCode.preempted)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
