"""Signals that the main thread cannot answer."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from dpo_dist.distributed import activity
from dpo_dist.distributed.activity import Doing, UnansweredSignals
from dpo_dist.foundation.errors import ExitCode

WAITING = Doing("step 3", "training/step.py:88 (reduce_step)", "all_reduce", 1000)
GONE_ON = Doing("step 4", "training/step.py:88 (reduce_step)", "all_reduce", 0.0)
COMPUTING = Doing("step 3", "training/step.py:61 (backward)", "", 1000)


@pytest.fixture
def signals() -> Iterator[UnansweredSignals]:
    former = signal.signal(signal.SIGUSR1, lambda *_: None)
    found = UnansweredSignals(600)
    yield found
    found.close()
    signal.signal(signal.SIGUSR1, former)


def send() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.1)  # another thread notes the time


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.monotonic() + seconds
    monkeypatch.setattr(activity.time, "monotonic", lambda: now)


def code(signals: UnansweredSignals, doing: Doing, *, is_peer_silent: bool = False) -> int | None:
    return signals.exit_code(doing, is_peer_silent=is_peer_silent)


def test_without_a_signal_nothing_ends(signals: UnansweredSignals) -> None:
    assert code(signals, WAITING, is_peer_silent=True) is None


def test_a_main_thread_that_goes_on_has_answered(
    signals: UnansweredSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    send()
    assert code(signals, WAITING) is None
    with monkeypatch.context() as patch:
        later(patch, 500)
        assert code(signals, GONE_ON, is_peer_silent=True) is None


@pytest.mark.parametrize(
    ("doing", "is_peer_silent", "seconds", "expected"),
    [
        (WAITING, True, 10, None),
        (WAITING, True, 25, ExitCode.preempted),
        (COMPUTING, True, 25, ExitCode.preempted),
        (WAITING, False, 100, None),
        (WAITING, False, 130, ExitCode.preempted),
        (COMPUTING, False, 500, None),
    ],
)
def test_a_signal_ends_a_wait_in_vain(
    doing: Doing,
    is_peer_silent: bool,
    seconds: float,
    expected: int | None,
    signals: UnansweredSignals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send()
    assert code(signals, doing) is None
    with monkeypatch.context() as patch:
        later(patch, seconds)
        assert code(signals, doing, is_peer_silent=is_peer_silent) == expected
    assert signals.name == "SIGUSR1"


def test_a_second_signal_ends_at_once_and_its_echo_does_not(
    signals: UnansweredSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        send()
    code(signals, COMPUTING)
    for seconds, expected in ((1.5, None), (5, None), (6.5, 128 + signal.SIGUSR1)):
        with monkeypatch.context() as patch:
            later(patch, seconds)
            if seconds == 5:
                send()
            assert code(signals, COMPUTING) == expected
