"""What the ranks of a run must have alike, found without other processes; and the files that count."""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch

from dpo_dist.config.schema import OptimConfig, RunConfig
from dpo_dist.distributed.processes.world import Peer, World, check_same_code
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.user_code import loaded_sources, user_function
from dpo_dist.training.start import environment
from dpo_dist.training.start.environment import check_same_start

PEERS = tuple(Peer(rank, f"node-{rank}", 1, str(rank)) for rank in range(4))


class Recorded(World):
    """A rank that hears of its own facts only."""

    heard: dict[str, str]

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def on_main(self, work: Callable[[], Any]) -> Any:
        return work()

    def differences(self, facts: Mapping[str, str]) -> dict[str, str]:
        Recorded.heard = dict(facts)
        return {}


@pytest.fixture
def facts() -> Callable[..., dict[str, str]]:
    def facts(config: RunConfig | None = None) -> dict[str, str]:
        check_same_start(config or RunConfig(), Recorded(None, 0, 4, torch.device("cpu"), PEERS))
        return Recorded.heard

    return facts


@pytest.fixture
def module(tmp_path: Path) -> Iterator[ModuleType]:
    """A module of accelerate that this process alone has."""
    module = ModuleType("accelerate.own")
    module.__file__ = str(tmp_path / "own.py")
    (tmp_path / "own.py").write_text("scale = 1\n")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_each_difference_of_ranks_is_one_fact(
    facts: Callable[..., dict[str, str]], module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_function(
        "tests.support.own_loss:hinge", "loss.function"
    )  # the checkout is a folder of the user's, too
    before = facts()

    def changed(config: RunConfig | None = None) -> list[str]:
        after = facts(config)
        return [name for name in before | after if before.get(name) != after.get(name)]

    assert changed() == []
    assert changed(RunConfig(optim=OptimConfig(lr=1e-3))) == ["optim.lr"]
    with monkeypatch.context() as patch:
        patch.setattr(accelerate, "__version__", "0.1")
        assert changed() == ["version of accelerate"]
    with monkeypatch.context() as patch:
        version = importlib.metadata.version
        patch.setattr(
            importlib.metadata, "version", lambda name: "0" if name == "datasets" else version(name)
        )
        assert changed() == ["version of datasets"]
    with monkeypatch.context() as patch:
        (tmp_path / "checkout").mkdir()
        (tmp_path / "checkout/losses.py").write_text("# an older commit\n")
        patch.setattr(environment, "_PACKAGE_FOLDER", tmp_path / "checkout")
        assert changed() == ["source of dpo_dist"]
    (tmp_path / "own.py").write_text("scale = 2\n")
    os.utime(tmp_path / "own.py", (1, 1))  # another time, also on a clock that ticks slowly
    assert changed() == ["source of accelerate.own"]


def test_what_is_installed_in_the_folder_of_a_function_is_not_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / ".venv/site-packages"), *sys.path])
    (tmp_path / ".venv/site-packages").mkdir(parents=True)
    (tmp_path / ".venv/site-packages/library_beside.py").write_text("")
    (tmp_path / "helper_beside.py").write_text("")
    (tmp_path / "loss_beside.py").write_text("import library_beside, helper_beside\ndef f(): ...\n")
    user_function("loss_beside:f", "loss.function")
    assert {name for name in loaded_sources(()) if "beside" in name} == {"loss_beside", "helper_beside"}


@pytest.mark.parametrize("other", range(1, 4))
def test_any_rank_is_compared_and_named(other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one behind the second; a module that a rank has not loaded is no difference."""

    compared: list[dict[str, str]] = []

    def gather(_self: World, value: Any) -> list[Any]:
        values = [value] * 4
        if isinstance(value, dict):
            compared.append(value)
            values[other] = value | {"attention": "sdpa"}
        elif isinstance(value, str):
            values[other] = "another digest"
        elif isinstance(value, set):
            values[other] = {"accelerate"}
        return values

    monkeypatch.setattr(World, "gather", gather)
    monkeypatch.setattr(World, "on_main", lambda _, work: work())
    world = World(None, 0, 4, torch.device("cpu"), PEERS)
    assert world.differences({"attention": "varlen", "dtype": "bf16"}) == {
        "attention": f"varlen on rank 0 (node-0) and 2 other ranks; sdpa on rank {other} (node-{other})"
    }
    with pytest.raises(ConfigError, match="different settings or software") as raised:
        check_same_code(world, {"attention": "varlen"})
    assert raised.value.where == "attention"
    assert "source of torch" in compared[-1]
    assert "source of accelerate" not in compared[-1]
