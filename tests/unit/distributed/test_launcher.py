"""The launcher passes signals on, waits for the processes, and ends with their exit code."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.distributed import launcher
from tests.support.launch import TWO_PROCESSES
from tests.support.warm import ENVIRONMENT, context, start_parent

WORKER = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.3)  # saves
    open(f"saved-{os.environ['RANK']}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGUSR1, lambda *_: open(f"heard-{os.environ['RANK']}", "w").close())
signal.signal(signal.SIGHUP, stop)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"started-{os.environ['RANK']}", "w").close()
if sys.argv[1] == "kill" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(float(sys.argv[1]) if sys.argv[1] != "kill" else 0)
"""


def _launch(folder: Path, seconds: str) -> None:
    os.chdir(folder)
    screen = os.open("screen", os.O_WRONLY | os.O_CREAT)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    from dpo_dist.launch import main

    os._exit(main(["--config_file", str(TWO_PROCESSES), "worker.py", seconds]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def start(folder: Path, seconds: str) -> Any:
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    start_parent()
    launcher = context.Process(target=_launch, args=(folder, seconds))
    launcher.start()
    return launcher


def test_a_signal_reaches_the_processes_and_their_exit_code_comes_back(folder: Path) -> None:
    launcher, deadline = start(folder, "100"), time.monotonic() + 240
    for sign, number in (("started", signal.SIGUSR1), ("heard", signal.SIGHUP)):
        while len(list(folder.glob(f"{sign}-*"))) < 2:
            assert time.monotonic() < deadline, (folder / "screen").read_text()
            time.sleep(0.05)
        os.kill(launcher.pid, number)
    launcher.join(240)
    assert launcher.exitcode == 75, (folder / "screen").read_text()
    assert len(list(folder.glob("saved-*"))) == 2
    assert "Traceback" not in (folder / "screen").read_text()


def test_a_killed_process_is_named(folder: Path) -> None:
    launcher = start(folder, "kill")
    launcher.join(240)
    assert launcher.exitcode == 137, (folder / "screen").read_text()
    assert "rank 1 was ended by SIGKILL" in (folder / "screen").read_text()


@pytest.mark.parametrize(
    "options", [["--config_file", "nowhere.yaml"], ["--cpu", "--multi_gpu"]], ids=["no file", "contradiction"]
)
def test_options_that_accelerate_refuses_are_one_block(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "stop_signals", tuple)
    assert launcher.launch([*options, "-m", "dpo_dist.train"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("configuration error: ") == 1
    assert "launch/accelerate" in errors
