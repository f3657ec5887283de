"""A world of one process, which may survive an error, as in a notebook."""

import signal

import pytest
import torch

from dpo_dist.distributed.peers import Peer
from dpo_dist.distributed.world import World, start_world
from dpo_dist.errors import ConfigError


class Alone(World):
    def barrier(self) -> None:
        pass


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("timed out"), ValueError("a bug")])
def test_an_error_of_the_only_process_is_raised_at_once(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other process caused it, and SIGTERM ends this process again afterwards."""
    monkeypatch.delattr(World, "_consequence")
    handler = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(type(failure)) as caught,
        Alone(None, 0, 1, torch.device("cpu"), (Peer.here(0),)).watch(),
    ):
        raise failure
    assert caught.value is failure
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_launch_without_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    with pytest.raises(ConfigError, match="without DeepSpeed") as found:
        start_world({}, 60)
    assert "cpu_2.yaml" in str(found.value)
