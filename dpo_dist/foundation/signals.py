"""Stop requests by signals and limits; ends a process that is blocked or whose launcher died."""

import _thread
import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

import psutil

from dpo_dist.foundation.errors import ExitCode, StoppedError
from dpo_dist.foundation.process import this_rank
from dpo_dist.foundation.streams import awaits_document, output_descriptor

BY_TRACKER = "the tracker"
BY_STEPS = "trainer.stop_after_steps"
BY_SECONDS = "trainer.max_seconds"
BY_CALLBACK = "a callback"
BY_FAULT = "a fault of the script on rank 0: "
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# Signals within these seconds count as one: Ctrl-C comes from the terminal and again from the launcher.
_REPEATED_SECONDS = 2.0
_EXIT_CALLBACK_SECONDS = 0.3
_MAIN_THREAD_SECONDS = 1.0
LAUNCHER_VARIABLE = "DPO_DIST_LAUNCHER"
"""Environment variable with the process id of `dpo-dist launch`, or of a tool that starts runs."""
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", LAUNCHER_VARIABLE)
_PR_SET_PDEATHSIG = 1


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask to stop; without SIGHUP if `nohup` ignores it."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return tuple(number for number in _SIGNALS if number is not signal.SIGHUP)
    return _SIGNALS


exit_callbacks: list[Callable[[int], object]] = []
"""Called with the exit code, in threads, when a second signal ends this process."""


class StopRequest:
    """This rank's vote on saving a checkpoint and stopping early; limits count from this start of the run."""

    def __init__(self, stop_after_steps: int | None = None, max_seconds: float | None = None):
        self._steps_left = math.inf if stop_after_steps is None else stop_after_steps
        self._deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self._is_deferred = False
        self._is_urgent = False
        self._first_signal = math.inf
        self.reason = ""

    def ask(self, reason: str) -> None:
        """Stop as soon as the progress can be saved; thread-safe."""
        self.reason = self.reason or reason
        self._is_urgent = True

    def vote(self) -> bool:
        """Return whether this rank wants to stop after the step just done."""
        self._steps_left -= 1
        if self._steps_left <= 0:
            self.reason = self.reason or BY_STEPS
        return self.is_urgent or bool(self.reason)

    @property
    def is_urgent(self) -> bool:
        """Return whether this rank wants to stop before an evaluation is complete."""
        if time.monotonic() > self._deadline:
            self.ask(BY_SECONDS)
        return self._is_urgent

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle stop signals and the end of `max_seconds` inside the block.

        Inside `deferred` the first signal asks to stop, elsewhere it raises StoppedError. A later signal, if
        it does not repeat the first, ends the process at once with 128 + its number. The launcher's death
        counts as SIGTERM, but never as a second signal. Threads other than the main one handle no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        is_limited = self._deadline < math.inf  # else the timer is the script's
        numbers = (*stop_signals(), signal.SIGALRM) if is_limited else stop_signals()
        previous = {number: signal.signal(number, self._receive) for number in numbers}
        if is_limited:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, self._deadline - time.monotonic()))
        try:
            with end_with_launcher():
                yield
        finally:
            if is_limited:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep signals inside the block as requests, which the block's `vote` returns, instead of raising."""
        before = self._is_deferred
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = before

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        is_limit = number == signal.SIGALRM
        if now > self._first_signal + _REPEATED_SECONDS and not is_limit:
            _end_now(128 + number)
        if self._first_signal < math.inf or (is_limit and self.reason):
            return
        if not is_limit:
            self._first_signal = now
            # Each thread of a dying launcher sends a signal: the second would end the save.
            _follow_launcher(0)
        name = BY_SECONDS if is_limit else signal.Signals(number).name
        self.ask(name)
        if not self._is_deferred:
            raise stopped_by(name)
        if this_rank() == 0:  # a step may take minutes
            with contextlib.suppress(OSError):
                os.write(2, f"{name}: saving after the work at hand; a second signal ends at once\n".encode())
        if not is_limit:  # else a repeat, handled only after a long C call, would count as a second signal
            time.sleep(_REPEATED_SECONDS)


def stopped_by(reason: str, when: str = "before the first step") -> StoppedError:
    """Return the error of a stop outside of the training steps."""
    return StoppedError(f"by {reason} {when}", remedy="run the same command again to continue")


def end_at_signals() -> None:
    """Until `StopRequest.listening`, end at a signal with one line and exit code 75; save nothing."""
    for number in stop_signals():
        signal.signal(number, _end_before_start)
    _follow_launcher()


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """End the process at a signal inside the block even if the main thread is blocked outside of Python.

    For blocks that have nothing to save. Signals without a Python handler keep their effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_over = threading.Event()
    is_resumable = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, raise_terminated)

    def end(number: int) -> None:
        if number not in _SIGNALS or is_over.wait(_MAIN_THREAD_SECONDS):
            return
        if is_resumable:
            _end_before_start(number, None)
        ending = f"ended by {signal.Signals(number).name}"
        _print_on_rank_0(ending, {"code": 128 + number, "message": ending})
        _end_now(128 + number)

    def listen() -> None:
        with reading:
            while numbers := reading.recv(64):
                for number in numbers:
                    end(number)

    # Python runs handlers in the main thread only; this socket gets a signal's number at once.
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    former = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(former)
        writing.close()


def _end_before_start(number: int, _frame: FrameType | None) -> None:
    error = stopped_by(signal.Signals(number).name, "before the start")
    _print_on_rank_0(str(error), error.as_dict())
    _end_now(ExitCode.preempted)


def _print_on_rank_0(text: str, content: Mapping[str, Any]) -> None:
    """Print an error without Python's streams, which the main thread may be using."""
    if this_rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
            if "--json" in sys.argv[1:] and awaits_document():
                os.write(output_descriptor(), f"{json.dumps({'error': content})}\n".encode())


def _end_now(exit_code: int) -> NoReturn:
    """End the process without waiting for threads, pools or other processes.

    `threading.Thread.start` could hang here: the signal may have interrupted a holder of its locks.
    """
    for callback in exit_callbacks:
        _thread.start_new_thread(callback, (exit_code,))
    if exit_callbacks:
        time.sleep(_EXIT_CALLBACK_SECONDS)
    os._exit(exit_code)


@contextlib.contextmanager
def end_with_launcher() -> Iterator[None]:
    """Receive SIGTERM inside the block when this process's launcher, if any, dies."""
    _follow_launcher()
    try:
        yield
    finally:
        _follow_launcher(0)


def _follow_launcher(number: int = signal.SIGTERM) -> None:
    """Ask Linux for this signal when the launcher, if any, dies (0: no signal); other systems cannot."""
    if any(name in os.environ for name in _LAUNCHER_VARIABLES):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
    launcher = os.environ.get(LAUNCHER_VARIABLE, "")
    if number and launcher.isdecimal() and os.getppid() == 1 and not psutil.pid_exists(int(launcher)):
        os.kill(os.getpid(), number)  # the launcher died earlier, while this process was importing


def raise_terminated(number: int, _frame: FrameType | None) -> None:
    """Handle SIGTERM by raising SystemExit, in a program that has nothing to save."""
    raise SystemExit(128 + number)
