"""One recorded trajectory, reached by every way of computing it (laws L1 and L3).

World size, token budget, kind of parallelism, gradient checkpointing and where reference values come from
decide who computes what, and must not show in a single number. The policy starts from another model than the
reference, so that no loss is trivially log 2. `scripts/record_golden.py` records it anew.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.golden.scenario import GOLDEN, SCENARIOS, overrides, write_scenario
from tests.support.launch import assert_same_history, history, train

WAYS = {
    "one process, small budget": (1, ["trainer.micro_batch_tokens=256"]),
    "one process, large budget, live": (1, ["trainer.micro_batch_tokens=8192", "reference.mode=live"]),
    "two processes, small budget": (2, ["trainer.micro_batch_tokens=256"]),
    "two processes, large budget, live": (2, ["trainer.micro_batch_tokens=8192", "reference.mode=live"]),
    "two processes, zero2": (2, ["parallelism.kind=zero2"]),
    "two processes, ddp, checkpointing": (2, ["parallelism.kind=ddp", "model.gradient_checkpointing=full"]),
    "two processes, every second layer checkpointed": (2, ["model.gradient_checkpointing=2"]),
    "two processes, compiled, checkpointed": (
        2,
        ["model.compile=true", "model.gradient_checkpointing=2"],
    ),
    "two processes, parameters offloaded": (
        2,
        ["parallelism.offload_parameters=cpu", "reference.mode=live", "reference.offload=cpu"],
    ),
}


@pytest.fixture(scope="session")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenario(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("way", WAYS)
def test_the_recorded_trajectory_is_reached_by_every_way(way: str, scenario: Path, tmp_path: Path) -> None:
    processes, extra = WAYS[way]
    if "compiled" in way and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    train([*overrides(scenario, "sigmoid"), f"run.dir={tmp_path}/run", *extra], processes=processes)
    golden = json.loads(GOLDEN.read_text())["sigmoid"]
    assert_same_history(history(tmp_path / "run"), golden, relative=2e-4)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "sigmoid"])
def test_other_losses_keep_their_recorded_trajectory_on_two_processes(
    name: str, scenario: Path, tmp_path: Path
) -> None:
    train([*overrides(scenario, name), f"run.dir={tmp_path}/run"], processes=2)
    golden = json.loads(GOLDEN.read_text())[name]
    assert_same_history(history(tmp_path / "run"), golden, relative=2e-4)
