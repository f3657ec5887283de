"""A world of one process, which may survive an error, as in a notebook."""

import signal

import pytest
import torch

from dpo_dist.distributed.peers import Peer
from dpo_dist.distributed.world import World


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
