"""Two network namespaces that a cable of two virtual interfaces joins: a network between two nodes."""

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000
NODES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Return why no namespaces can be made here; "" if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "not installed: ip (package iproute2)"
    name = f"dpo{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "the kernel refuses network namespaces" if made.returncode else ""


@dataclass(frozen=True)
class Network:
    """Two nodes with the addresses of `NODES`; picklable for ranks."""

    name: str

    def enter(self, node: int) -> None:
        """Move this process to a node; for one without other threads."""
        with Path(f"/run/netns/{self.name}{node}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        os.environ.update(GLOO_SOCKET_IFNAME=self._interface(node), MASTER_ADDR=NODES[0])
        socket.gethostname = lambda: f"node{node}"

    def set_link(self, state: str) -> None:
        """Connect ("up") or cut ("down") the nodes."""
        _ip("-n", f"{self.name}0", "link", "set", self._interface(0), state)

    def _interface(self, node: int) -> str:
        return f"{self.name}v{node}"


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Yield two connected nodes, and remove them."""
    made = Network(f"dpo{os.getpid() % 10**6}")
    names = [f"{made.name}{node}" for node in range(2)]
    ends = [made._interface(node) for node in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, NODES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for interface in ("lo", end):
                _ip("-n", name, "link", "set", interface, "up")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=120)
