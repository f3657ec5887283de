"""All ranks agree to stop, and a batch script learns of the stops of a person."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.distributed.processes import Peer
from dpo_dist.distributed.world import GivenWay, Stops, World
from dpo_dist.foundation.errors import StoppedError
from dpo_dist.foundation.process import BY_STEPS, BY_TRACKER, PROGRESS, StopRequest


class Alone(World):
    def gather(self, value: Any) -> list[Any]:
        return [value, "", "SIGTERM"]


def stops() -> Stops:
    return Stops(StopRequest(stop_after_steps=1), Alone(None, 0, 1, torch.device("cpu"), (Peer.here(0),)))


def test_work_ends_only_when_a_rank_is_asked() -> None:
    asked = stops()
    asked.check()
    asked.give_way()
    asked.request.ask("SIGUSR1")
    with pytest.raises(GivenWay):
        asked.give_way()
    with pytest.raises(StoppedError, match="stopped: by SIGTERM, SIGUSR1 before the first step"):
        asked.check()
    assert asked.agreed == "SIGTERM, SIGUSR1"


@pytest.mark.parametrize("reason", ["SIGUSR1", BY_TRACKER, BY_STEPS])
def test_a_stop_of_a_person_is_noted(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS, str(tmp_path / "progress"))
    asked = stops()
    asked.request.ask(reason)
    asked.reasons()
    noted = (tmp_path / "progress").read_text() if (tmp_path / "progress").exists() else ""
    assert noted.startswith("stopped by") is (reason != "SIGUSR1")
    assert (reason in noted) is (reason != "SIGUSR1")
