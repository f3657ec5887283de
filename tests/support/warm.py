"""Verbs on real processes that are forked from a warm parent, which has imported everything once.

A cold start imports for eight seconds on each process. A forked process runs the verb as `__main__`, with its
command line, environment, working folder and exit code; `launch.run_verb(cold=True)` takes the real command
line.
"""

import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from dpo_dist.config.verbs import VERBS
from tests.support.parent import ENVIRONMENT, check_warm, context, start_parent

# A failing rank may have sent its error to the others, which then end too; a killed one has not.
_GRACE_SECONDS = 10
GRACE_AFTER_KILL_SECONDS = 3
_POLL_SECONDS = 0.05

_reserved_ports: list[socket.socket] = []


def reserve_port() -> int:
    """Return a port for rank 0 of a world; until this process ends, no other test is given it."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # rank 0 can listen there, too
    reservation.bind(("", 0))
    _reserved_ports.append(reservation)
    port: int = reservation.getsockname()[1]
    return port


@cache
def launcher_variables(config_file: Path) -> dict[str, str]:
    """Return the variables that `accelerate launch` with this file adds to every process."""
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(config_file), "script"])
    with (
        mock.patch.dict(os.environ, ENVIRONMENT),
        mock.patch.object(launch, "deepspeed_launcher") as launcher,
    ):
        launch.launch_command(arguments)
        _, whole = prepare_deepspeed_cmd_env(launcher.call_args.args[0])
    return {
        name: value
        for name, value in whole.items()
        if name.startswith("ACCELERATE_") or os.environ.get(name) != value
    }


def run_warm(
    verb: str,
    overrides: list[str],
    variables: dict[str, str],
    size: int,
    folder: Path,
    seconds: float,
    prepare: Callable[[], None] | None = None,
) -> tuple[int, str]:
    """Run a verb on `size` processes; exit code and screen as `python -m` or `dpo-dist launch` give them.

    `variables` are the whole environment; `seconds` those after which the test fails; `prepare` is called in
    each process before the verb.
    """
    with tempfile.TemporaryDirectory() as temporary:
        screen = Path(temporary) / "screen"
        code = wait(start_verb(verb, overrides, variables, size, folder, screen, prepare), seconds)
        return code, screen.read_text(encoding="utf-8")


def start_verb(
    verb: str,
    overrides: list[str],
    variables: dict[str, str],
    size: int,
    folder: Path,
    screen: Path,
    prepare: Callable[[], None] | None = None,
) -> list[Any]:
    """Start a verb on `size` processes, by rank, which write to the file `screen`; else as `run_warm`."""
    start_parent()
    return start_module(context, VERBS[verb].module, overrides, variables, size, folder, screen, prepare)


def start_module(
    starts: Any,
    module: str,
    arguments: list[str],
    variables: dict[str, str],
    size: int,
    folder: Path,
    screen: Path,
    prepare: Callable[[], None] | None = None,
    errors: Path | None = None,
) -> list[Any]:
    """Start a module as `start_verb` does; `starts` is the context of multiprocessing.

    With `errors`, standard error goes to that file.
    """
    port = str(reserve_port())
    processes = []
    for rank in range(size):
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        world = {name: str(number) for name, number in place.items()}
        own = {**variables, **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = own if size > 1 else variables
        process = starts.Process(
            target=_be_module,
            args=(module, arguments, environment, folder, screen, errors or screen, prepare),
        )
        process.start()
        processes.append(process)
    return processes


def run_warm_apart(
    module: str,
    arguments: list[str],
    variables: dict[str, str],
    folder: Path,
    seconds: float,
    prepare: Callable[[], None] | None = None,
    size: int = 1,
) -> tuple[int, str, str]:
    """Run a module on `size` processes as `run_warm` does; exit code, standard output, standard error."""
    start_parent()
    with tempfile.TemporaryDirectory() as temporary:
        output, errors = Path(temporary) / "output", Path(temporary) / "errors"
        started = start_module(context, module, arguments, variables, size, folder, output, prepare, errors)
        code = wait(started, seconds)
        return code, output.read_text(encoding="utf-8"), errors.read_text(encoding="utf-8")


def wait(processes: list[Any], seconds: float) -> int:
    """Wait as `dpo-dist launch` does for several: the first failure ends all, with its exit code."""
    deadline = time.monotonic() + seconds
    first = None
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
            raise TimeoutError(f"the verb took longer than {seconds} s")
        if failed := [process.exitcode for process in processes if process.exitcode]:
            first = failed[0]
            grace = GRACE_AFTER_KILL_SECONDS if min(failed) < 0 else _GRACE_SECONDS
            _end(processes, grace)
        processes[0].join(_POLL_SECONDS)
    codes = [process.exitcode for process in processes]
    code: int = first or next(filter(None, codes), 0)
    return code if code >= 0 or len(codes) == 1 else 128 - code


def _end(processes: list[Any], grace: float) -> None:
    """Ask those that do not end by themselves to stop, and kill them if they wait in a blocked call."""
    for process in processes:
        process.join(grace)
        process.terminate()
    for process in processes:
        process.join(grace)
        process.kill()


def be_random_anew() -> None:
    """Seed this process as a new one: as forks of one parent all would draw the same random numbers."""
    random.seed()
    np.random.seed()


def _be_module(
    module: str,
    arguments: list[str],
    variables: dict[str, str],
    folder: Path,
    screen: Path,
    errors: Path,
    prepare: Callable[[], None] | None,
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without
    for descriptor, file in ((1, screen), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    check_warm()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    be_random_anew()
    sys.argv = [module, *arguments]
    if prepare is not None:
        prepare()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
