"""The launcher passes signals on, waits for the processes, and ends with their exit code."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed.elastic.multiprocessing import PContext

from dpo_dist.distributed.processes import launcher
from tests.support.launch import TWO_PROCESSES
from tests.support.warm import ENVIRONMENT, context, start_parent

WORKER = """
import os, signal, sys, time
from dpo_dist.foundation.signals import (StopRequest, end_at_signals)
def start():
    open(f"started-{os.environ['RANK']}", "w").write(str(os.getpid()))
def stop(number=0, frame=None):
    time.sleep(0.3)  # saves
    open(f"saved-{os.environ['RANK']}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGUSR1, lambda *_: open(f"heard-{os.environ['RANK']}", "w").close())
signal.signal(signal.SIGUSR2, stop)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "train":
    request = StopRequest()
    with request.listening(), request.deferred():
        start()
        while not request.vote():
            time.sleep(0.05)
        open(f"saving-{os.environ['RANK']}", "w").close()
        time.sleep(0.5)
    stop()
if sys.argv[1] == "import":
    end_at_signals()
start()
if sys.argv[1] == "stop":
    if os.environ["RANK"] == "1":
        open("stopping", "w").close()
        os.kill(os.getpid(), signal.SIGSTOP)
    while not os.path.exists("stopping"):
        time.sleep(0.05)
    sys.exit(69)
if sys.argv[1] == "kill" and os.environ["RANK"] == "1":
    while not os.path.exists("started-0") or not os.path.getsize("started-0"):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(SECONDS if sys.argv[1] != "kill" else 0)
"""
_LONGEST_SECONDS = 900


def _launch(folder: Path, work: str) -> None:
    os.chdir(folder)
    screen = os.open("screen", os.O_WRONLY | os.O_CREAT)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    PContext.close.__defaults__ = (None, 1)  # seconds in place of 30
    os._exit(launcher.launch(["--config_file", str(TWO_PROCESSES), "worker.py", work]))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a worker that outlives the longest wait for its end."""
    (tmp_path / "worker.py").write_text(WORKER.replace("SECONDS", str(10 * _LONGEST_SECONDS)))
    yield tmp_path
    for number in processes(tmp_path):
        with contextlib.suppress(psutil.Error):  # it has ended
            process = psutil.Process(number)
            if "worker.py" in process.cmdline():
                process.kill()


def start(folder: Path, work: str) -> Any:
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    start_parent()
    launcher = context.Process(target=_launch, args=(folder, work))
    launcher.start()
    return launcher


def test_a_signal_reaches_the_processes_and_their_exit_code_comes_back(folder: Path) -> None:
    launcher = start(folder, "wait")
    for sign, number in (("started", signal.SIGUSR1), ("heard", signal.SIGUSR2)):
        wait_until(lambda: len(list(folder.glob(f"{sign}-*"))) == 2, folder)  # noqa: B023
        os.kill(launcher.pid, number)
    launcher.join(_LONGEST_SECONDS)
    assert launcher.exitcode == 75, (folder / "screen").read_text()
    assert len(list(folder.glob("saved-*"))) == 2
    assert "Traceback" not in (folder / "screen").read_text()


def wait_until(condition: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + _LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < deadline, (folder / "screen").read_text()
        time.sleep(0.05)


def processes(folder: Path) -> list[int]:
    """The ranks that have started, by process id."""
    return [int(text) for file in folder.glob("started-*") if (text := file.read_text())]


@pytest.mark.parametrize(("work", "code"), [("stop", 69), ("kill", 137)])
def test_a_stopped_or_killed_process_does_not_outlive_the_launcher(
    work: str, code: int, folder: Path
) -> None:
    launcher = start(folder, work)
    launcher.join(_LONGEST_SECONDS)
    screen = (folder / "screen").read_text()
    assert launcher.exitcode == code, screen
    assert len(processes(folder)) == 2
    assert not any(map(psutil.pid_exists, processes(folder)))
    assert ("rank 1 was ended by SIGKILL" in screen) is (work == "kill")


@pytest.mark.parametrize(("work", "saved"), [("import", 0), ("train", 2)])
def test_processes_save_and_end_when_their_launcher_is_killed(work: str, saved: int, folder: Path) -> None:
    launcher = start(folder, work)
    wait_until(lambda: len(processes(folder)) == 2, folder)
    launcher.kill()
    wait_until(lambda: not any(map(psutil.pid_exists, processes(folder))), folder)
    assert len(list(folder.glob("saved-*"))) == saved


def test_a_launcher_that_dies_while_they_save_does_not_end_them(folder: Path) -> None:
    launcher = start(folder, "train")
    wait_until(lambda: len(processes(folder)) == 2, folder)
    os.kill(launcher.pid, signal.SIGTERM)
    wait_until(lambda: len(list(folder.glob("saving-*"))) == 2, folder)
    launcher.kill()
    wait_until(lambda: not any(map(psutil.pid_exists, processes(folder))), folder)
    assert len(list(folder.glob("saved-*"))) == 2
