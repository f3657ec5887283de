"""Faults of the network between two nodes: two network namespaces on this machine."""

import json
import time
from functools import partial
from pathlib import Path

import pytest

from dpo_dist.distributed import processes
from dpo_dist.distributed.world import World
from tests.dist.scenario import Assets
from tests.dist.test_checkpoint import Trainer
from tests.support.namespaces import missing, network
from tests.support.ranks import start_ranks

STEPS = [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10]]
OUTAGE_SECONDS, TIMEOUT_SECONDS = 15, 20

pytestmark = pytest.mark.cluster


def wait_for(file: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} was not written"
        time.sleep(0.1)


def train_through_faults(assets: Assets, world: World, folder: Path) -> None:
    """Train without a fault, then the same with one, then wait for a rank that cannot be reached any more."""
    processes.PATIENCE_SECONDS = 2
    undisturbed = Trainer(assets, world)
    expected = [undisturbed.step(rows) for rows in STEPS]
    trainer = Trainer(assets, world)
    found = [trainer.step(rows) for rows in STEPS[:2]]
    (folder / f"half-{world.rank}").touch()
    wait_for(folder / "cut")
    began = time.monotonic()
    found += [trainer.step(rows) for rows in STEPS[2:]]
    waited = time.monotonic() - began
    report = {"expected": expected, "found": found, "waited": waited}
    (folder / f"result-{world.rank}.json").write_text(json.dumps(report))
    world.barrier()
    (folder / f"whole-{world.rank}").touch()
    wait_for(folder / "cut for good")
    trainer.step(STEPS[0])


@pytest.mark.skipif(bool(reason := missing()), reason=reason)
def test_an_outage_is_waited_for_and_a_lost_network_ends_both_nodes(assets: Assets, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    with network() as between:
        scenario = partial(train_through_faults, assets)
        ranks = start_ranks(scenario, 2, folder, timeout=TIMEOUT_SECONDS, enter=between.enter)
        for rank in range(2):
            wait_for(folder / f"half-{rank}")
        between.set_link("down")
        (folder / "cut").touch()
        time.sleep(OUTAGE_SECONDS)
        between.set_link("up")
        for rank in range(2):
            wait_for(folder / f"whole-{rank}")
        between.set_link("down")
        (folder / "cut for good").touch()
        cut = time.monotonic()
        first, second = ranks.finish(2 * TIMEOUT_SECONDS + 200)
    for rank in range(2):
        report = json.loads((folder / f"result-{rank}.json").read_text())
        assert report["found"] == report["expected"], "nothing is lost"
        assert report["waited"] > OUTAGE_SECONDS - 5, "the steps were under way during the outage"
    assert time.monotonic() - cut < 2 * TIMEOUT_SECONDS + 60
    assert (first.error, first.reporting_rank) == ("PeerLostError", 0), first.log
    assert "rank 1 of 2 does not answer" in first.message
    assert (second.error, second.reporting_rank) == ("PeerLostError", 1), second.log
    assert "rank 0 of 2 does not answer" in second.message
