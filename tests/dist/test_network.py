"""Faults of the network between two nodes: two network namespaces on this machine."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from dpo_dist.distributed.processes import failures
from dpo_dist.distributed.processes.world import World
from tests.dist.scenario import Assets
from tests.dist.test_checkpoint import Trainer
from tests.support.ranks import start_ranks

STEPS = [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10]]
# TCP sends again 3.0 and 6.2 seconds after the cut, if the waits double from 0.2.
OUTAGE_SECONDS, TIMEOUT_SECONDS = 5, 12
NODES = ("10.77.0.1", "10.77.0.2")
_CLONE_NEWNET = 0x40000000

pytestmark = pytest.mark.cluster


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=120)


@dataclass(frozen=True)
class Network:
    """Two nodes with the addresses of `NODES`; picklable for ranks."""

    name: str

    def enter(self, node: int) -> None:
        """Move this process to a node; for one without other threads."""
        with Path(f"/run/netns/{self.name}{node}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        os.environ.update(GLOO_SOCKET_IFNAME=f"{self.name}v{node}", MASTER_ADDR=NODES[0])
        socket.gethostname = lambda: f"node{node}"

    def set_link(self, state: str) -> None:
        """Connect ("up") or cut ("down") the nodes."""
        ip("-n", f"{self.name}0", "link", "set", f"{self.name}v0", state)


@pytest.fixture
def network() -> Iterator[Network]:
    """Two connected nodes, removed at the end."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip (package iproute2)")
    made = Network(f"dpo{os.getpid() % 10**6}")
    names, ends = ([f"{made.name}{kind}{node}" for node in range(2)] for kind in ("", "v"))
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError:
            pytest.skip("the kernel refuses network namespaces")
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, NODES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for interface in ("lo", end):
                ip("-n", name, "link", "set", interface, "up")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def wait_for(file: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} was not written"
        time.sleep(0.1)


def train_through_faults(assets: Assets, world: World, folder: Path) -> None:
    """Train without a fault, then the same with one, then wait for a rank that cannot be reached any more."""
    failures.PATIENCE_SECONDS = failures.STORE_SECONDS = failures.FAREWELL_SECONDS = 2
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


def test_an_outage_is_waited_for_and_a_lost_network_ends_both_nodes(
    network: Network, assets: Assets, tmp_path: Path
) -> None:
    folder = tmp_path / "ranks"
    scenario = partial(train_through_faults, assets)
    ranks = start_ranks(scenario, 2, folder, timeout=TIMEOUT_SECONDS, enter=network.enter)
    for rank in range(2):
        wait_for(folder / f"half-{rank}")
    network.set_link("down")
    (folder / "cut").touch()
    time.sleep(OUTAGE_SECONDS)
    network.set_link("up")
    for rank in range(2):
        wait_for(folder / f"whole-{rank}")
    network.set_link("down")
    (folder / "cut for good").touch()
    cut = time.monotonic()
    first, second = ranks.finish(2 * TIMEOUT_SECONDS + 200)
    for rank in range(2):
        report = json.loads((folder / f"result-{rank}.json").read_text())
        assert report["found"] == report["expected"], "nothing is lost"
        assert report["waited"] > OUTAGE_SECONDS / 2, "the steps were under way during the outage"
    assert time.monotonic() - cut < 2 * TIMEOUT_SECONDS + 60
    assert (first.error, first.is_printed_here) == ("PeerLostError", True), first.log
    assert "rank 1 of 2 does not answer" in first.message
    assert (second.error, second.is_printed_here) == ("PeerLostError", True), second.log
    assert "rank 0 of 2 does not answer" in second.message
