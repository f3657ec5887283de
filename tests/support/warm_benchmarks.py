"""Benchmarks whose processes are forked from the warm parent, as are the processes that they start."""

import importlib
import multiprocessing
import sys
import tempfile
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, CompletedProcess
from types import SimpleNamespace
from typing import Any
from unittest import mock

from accelerate.commands.launch import launch_command_parser

from dpo_dist.config.verbs import VERBS
from tests.support.launch import environment
from tests.support.parent import ROOT
from tests.support.warm import launcher_variables, run_warm_apart, start_module, wait

_ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch"]
_RUN_SECONDS = 900.0


def run_benchmark(name: str, *arguments: str, seconds: float, with_trl: bool = False) -> tuple[int, str, str]:
    """Run a benchmark; exit code, output and errors.

    `with_trl`: TRL is imported once for all its runs.
    """
    prepare = partial(_fork_runs, ["trl.trainer.dpo_trainer"] if with_trl else [])
    return run_warm_apart("benchmarks", [name, *arguments], environment(), ROOT, seconds, prepare)


def _fork_runs(modules: list[str]) -> None:
    """From now on `benchmarks.runs` forks this process in place of starting Python."""
    from benchmarks import runs

    for module in modules:
        importlib.import_module(module)
    stand_in = SimpleNamespace(run=run_fork, PIPE=PIPE, STDOUT=STDOUT)
    mock.patch.object(runs, "subprocess", stand_in).start()


def run_fork(command: list[str], env: dict[str, str], **_options: Any) -> CompletedProcess[str]:
    """Run a command line of Python, or of Accelerate's launcher, in forks; its whole screen as its output."""
    assert command[0] == sys.executable
    size, variables, module, arguments = _parsed(command[1:])
    with tempfile.TemporaryDirectory() as temporary:
        screen = Path(temporary) / "screen"
        forks = multiprocessing.get_context("fork")
        processes = start_module(forks, module, arguments, {**env, **variables}, size, Path.cwd(), screen)
        code = wait(processes, _RUN_SECONDS)
        return CompletedProcess(command, code, screen.read_text())


def _parsed(arguments: list[str]) -> tuple[int, dict[str, str], str, list[str]]:
    """Return the processes, the launcher's variables, the module and its arguments."""
    if arguments[:3] != _ACCELERATE:
        option, module, *own = arguments
        assert option == "-m"
        if module == "dpo_dist" and own[:1] and own[0] in VERBS:  # whose program would start Python anew
            module, own = VERBS[own[0]].module, own[1:]
        return 1, {}, module, own
    launch = launch_command_parser().parse_args(arguments[3:])
    assert launch.module
    added = launcher_variables(Path(launch.config_file))
    return launch.num_processes, added, launch.training_script, launch.training_script_args
