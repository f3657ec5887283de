"""Requests to stop: by signals, limits, and a tracker."""

import _thread
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo_dist.foundation import signals
from dpo_dist.foundation.errors import ExitCode, StoppedError, exit_after
from dpo_dist.foundation.signals import StopRequest

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short_echoes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_REPEATED_SECONDS", 0.2)


@pytest.fixture(autouse=True)
def answered_hangup() -> Iterator[None]:
    """The tests may have been started by nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the interpreter answers between two instructions


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_a_request_within_the_steps_and_an_error_elsewhere(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        assert not stop.vote()
        send(number)
        assert stop.is_urgent
        assert stop.vote()
        assert stop.reason == number.name
    stop = StopRequest()
    with pytest.raises(StoppedError, match=number.name) as caught, stop.listening():
        send(number)
    assert caught.value.exit_code == ExitCode.preempted
    assert signal.getsignal(number) is handler


def test_the_end_of_the_terminal_is_ignored_under_nohup() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening(), stop.deferred():
            send(signal.SIGHUP)
            assert not stop.is_urgent
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; return its exit code."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_an_echo_of_a_signal_is_ignored_and_a_second_one_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A launcher passes on the signal that the process has got from the terminal."""
    monkeypatch.setattr(signals, "_REPEATED_SECONDS", 1.0)
    monkeypatch.setattr(signals, "_EXIT_CALLBACK_SECONDS", 2.0)
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM]).start()
        send(signal.SIGINT)
        assert stop.reason == "SIGINT"

    def wait_for_the_second() -> None:
        signals.exit_callbacks.append(lambda code: (tmp_path / "said").write_text(str(code)))
        signals.exit_callbacks.append(lambda _: time.sleep(600))
        stop = StopRequest()
        # A pool waits for its threads when it is left.
        with stop.listening(), stop.deferred(), ThreadPoolExecutor() as pool:
            pool.submit(time.sleep, 600)
            send(signal.SIGINT)
            time.sleep(0.3)
            send(signal.SIGINT)

    started = time.monotonic()
    assert in_child(wait_for_the_second) == 130
    assert time.monotonic() - started < 300
    assert (tmp_path / "said").read_text() == "130"


@pytest.mark.parametrize(("seconds", "exit_code"), [(0.2, 0), (3.0, 128 + signal.SIGTERM)])
def test_an_echo_is_answered_before_a_long_call_and_a_second_signal_after_it(
    seconds: float, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_REPEATED_SECONDS", 2.0)

    def repeat() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    def block() -> None:
        stop = StopRequest()
        with stop.listening(), stop.deferred():
            _thread.start_new_thread(repeat, ())
            send(signal.SIGTERM)
            # The other threads take the signal, so that nothing wakes this one.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            ctypes.CDLL(None).usleep(2_900_000)
            time.sleep(0.01)

    assert in_child(block) == exit_code


def test_before_the_start_a_signal_ends_with_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def start() -> None:
        signals.end_at_signals()
        send(signal.SIGUSR1)

    assert in_child(start) == ExitCode.preempted
    shown = capfd.readouterr()
    assert shown.err.startswith("stopped: by SIGUSR1 before the start\n")
    assert shown.out == ""


@pytest.mark.parametrize("is_late", [False, True])
def test_with_json_a_signal_before_the_start_prints_the_one_document(
    is_late: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`is_late`: standard output is kept for the document by then."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--json"])
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))  # noqa: SIM115

    def start() -> None:
        signals.end_at_signals()
        if is_late:
            exit_after(lambda: send(signal.SIGUSR1) or 0)
        send(signal.SIGUSR1)

    assert in_child(start) == ExitCode.preempted
    error = json.loads(capfd.readouterr().out)["error"]
    assert (error["code"], error["message"]) == (75, "by SIGUSR1 before the start")


@pytest.mark.parametrize("is_resumable", [True, False])
def test_a_signal_is_answered_while_the_main_thread_is_blocked(
    is_resumable: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a collective call: no handler of Python's runs meanwhile. Other signals come before."""
    monkeypatch.setattr(signals, "_MAIN_THREAD_SECONDS", 0.1)

    def send_both() -> None:
        for number in (signal.SIGCHLD, signal.SIGTERM):
            time.sleep(0.2)
            os.kill(os.getpid(), number)

    def block() -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, signals.raise_terminated)
        with (
            StopRequest().listening() if is_resumable else contextlib.nullcontext(),
            signals.exit_on_signal(),
        ):
            _thread.start_new_thread(send_both, ())
            # The other threads take the signals, so that nothing wakes this one.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])
            ctypes.CDLL(None).sleep(600)

    started = time.monotonic()
    assert in_child(block) == (ExitCode.preempted if is_resumable else 143)
    assert time.monotonic() - started < 300
    assert ("stopped: by SIGTERM" if is_resumable else "ended by SIGTERM\n") in capfd.readouterr().err


def test_the_limit_of_seconds_counts_during_steps_and_before() -> None:
    stop = StopRequest(max_seconds=0.05)
    with stop.listening(), stop.deferred():
        assert not stop.vote()
        time.sleep(0.1)
        assert stop.vote()
        assert stop.reason == "trainer.max_seconds"
    with (
        pytest.raises(StoppedError, match=r"trainer\.max_seconds"),
        StopRequest(max_seconds=0.05).listening(),
    ):
        time.sleep(1)
    time.sleep(0.06)  # no alarm is left


def test_without_a_limit_of_seconds_the_alarm_is_that_of_the_script() -> None:
    rung: list[int] = []
    former = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        with StopRequest().listening():
            send(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_the_limit_of_steps_lets_an_evaluation_end_and_a_tracker_does_not() -> None:
    stop = StopRequest(stop_after_steps=2)
    assert [stop.vote(), stop.is_urgent, stop.vote(), stop.is_urgent] == [False, False, True, False]
    assert stop.reason == "trainer.stop_after_steps"
    stop = StopRequest(stop_after_steps=5)
    stop.ask("the tracker")
    stop.ask("SIGTERM")
    assert (stop.vote(), stop.is_urgent, stop.reason) == (True, True, "the tracker")


def test_a_run_that_a_tool_starts_gets_a_signal_when_the_tool_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ctypes.c_int()
    monkeypatch.setenv(signals.LAUNCHER_VARIABLE, str(os.getpid()))
    with signals.end_with_launcher():
        ctypes.CDLL(None).prctl(2, ctypes.byref(asked))  # PR_GET_PDEATHSIG
    assert asked.value == signal.SIGTERM


def test_a_launcher_that_died_during_the_imports_counts_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setenv(signals.LAUNCHER_VARIABLE, str(os.getpid()))
    with StopRequest().listening():
        pass
    monkeypatch.setenv(signals.LAUNCHER_VARIABLE, str(gone.pid))
    with pytest.raises(StoppedError, match="SIGTERM"), StopRequest().listening():
        pass
