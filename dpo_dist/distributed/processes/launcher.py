"""`accelerate launch`, with the exit code of the run and time for its last checkpoint."""

import argparse
import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.errors import ConfigError, ExitCode, PeerLostError, first_line
from dpo_dist.foundation.remedies import COMMAND_LINE
from dpo_dist.foundation.signals import LAUNCHER_VARIABLE, stop_signals


def launch(arguments: Sequence[str]) -> int:
    """Start processes as `accelerate launch` does, and return the exit code of the first one that failed.

    Signals are passed on to the processes, which save and end by themselves: torch's own launcher would kill
    them after 30 seconds. A process that was killed by a signal counts as 128 + its number.
    Options and addresses that cannot be used are a `DpoDistError`.
    """
    try:
        parsed = _parsed(arguments)
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGQUIT")  # torch's launcher then handles no other
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # lists its own defaults
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torch's launcher does, with a warning
        for number in stop_signals():
            signal.signal(number, _pass_on)
        launch_command(parsed)
        return ExitCode.completed
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _exit_code(failure.exitcode, f"rank {rank}")
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode, "the process")
    except (DistError, RendezvousError) as error:
        raise PeerLostError(
            "the nodes' launchers did not connect",
            where=f"{parsed.main_process_ip}, port {parsed.main_process_port}",
            got=first_line(error),
            remedy="check that every node runs its launcher and reaches this address; then start again",
        ) from error
    except (ValueError, OSError) as error:  # no such file; a port that is in use
        fault = " ".join(str(error).split())
        raise _refused("accelerate cannot start processes with these options", fault) from error


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    usage = io.StringIO()
    parser = launch_command_parser()
    try:
        with contextlib.redirect_stderr(usage):
            parsed: argparse.Namespace = parser.parse_args(list(arguments))
    except SystemExit as ended:
        if not ended.code:  # --help
            raise
        fault = usage.getvalue().strip().rpartition("error: ")[2]
        raise _refused("accelerate does not accept these arguments", fault) from None
    is_keys = parsed.training_script.endswith((".yaml", ".yml"))  # which a verb takes
    is_file = parsed.no_python or (Path(parsed.training_script).is_file() and not is_keys)
    if not is_file and parsed.training_script in VERBS:
        parsed.training_script_args.insert(0, parsed.training_script)
        parsed.module = True
        parsed.training_script = "dpo_dist"
    elif not is_file and not parsed.module:
        raise _refused(
            "the program to start is neither a file nor a verb nor a module",
            parsed.training_script,
        )
    is_here = not parsed.config_file and (parsed.num_machines or 1) == 1
    if is_here and (parsed.num_processes or 1) > 1 and not torch.accelerator.is_available():
        parsed.use_deepspeed = parsed.use_cpu = True  # else accelerate starts one process
        parsed.main_process_port = parsed.main_process_port or 0
    if parsed.log_dir is None and parsed.tee == "0":
        parsed.log_dir = os.devnull  # else each start leaves a folder in the temporary folder
    parsed.quiet = False  # with it accelerate ends with 1; no traceback is printed anyway
    return parsed


_OPTIONS = "use a file of launch/accelerate; dpo-dist launch --help explains the options"


def _refused(message: str, got: str) -> ConfigError:
    return ConfigError(
        message,
        where=COMMAND_LINE,
        got=got,
        expected="dpo-dist launch [--config_file FILE] train OVERRIDES",
        remedy=_OPTIONS,
    )


def _exit_code(returned: int, name: str) -> int:
    if returned >= 0:
        return returned
    sys.stderr.write(f"{name} was ended by {signal.Signals(-returned).name}\n")
    return 128 - returned


def _pass_on(number: int, _frame: FrameType | None) -> None:
    children = psutil.Process().children()
    if not children:  # no process has started yet
        os._exit(ExitCode.preempted)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
