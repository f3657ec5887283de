"""Requests to stop: by signals, limits, and a tracker."""

import os
import signal
import time

import pytest

from dpo_dist.distributed import signals
from dpo_dist.distributed.signals import ForcedStop, StopRequest
from dpo_dist.errors import ExitCode, StoppedError

STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


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


def test_an_echo_of_a_signal_is_ignored_and_a_second_one_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launcher passes on the signal that the process has got from the terminal."""
    monkeypatch.setattr(signals, "_REPEATED_SECONDS", 0.2)
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(ForcedStop) as caught:
            send(signal.SIGINT)
    assert caught.value.code == 130
    assert stop.reason == "SIGINT"


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


def test_the_limit_of_steps_lets_an_evaluation_end() -> None:
    stop = StopRequest(stop_after_steps=2)
    assert [stop.vote(), stop.is_urgent] == [False, False]
    assert [stop.vote(), stop.is_urgent] == [True, False]
    assert stop.reason == "trainer.stop_after_steps"


def test_a_tracker_stops_at_once_and_the_first_reason_counts() -> None:
    stop = StopRequest(stop_after_steps=5)
    stop.ask("the tracker")
    stop.ask("SIGTERM")
    assert stop.vote()
    assert stop.is_urgent
    assert stop.reason == "the tracker"
