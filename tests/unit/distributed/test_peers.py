"""Processes of the run that a process can see die."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_dist.distributed.activity import Neighbours, Peer

NO_PROCESS = 2**22 + 1


def test_only_processes_of_this_host_and_container_are_visible() -> None:
    own = Peer.here(0)
    dead = Peer(1, own.host, NO_PROCESS, own.namespace)
    others = [replace(dead, rank=2, host="another"), replace(dead, rank=3, namespace="pid:[1]")]
    assert Neighbours([own, dead, *others], 0).lost() == [dead]
    assert Neighbours([own, replace(dead, pid=os.getpid()), *others], 0).lost() == []


def test_without_namespaces_processes_are_compared_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS, or without /proc."""

    def fail(_path: Path) -> Path:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/ns/pid")

    monkeypatch.setattr(Path, "readlink", fail)
    own = Peer.here(0)
    dead = Peer(1, own.host, NO_PROCESS, own.namespace)
    assert Neighbours([own, dead], 0).lost() == [dead]


def test_hosts_of_one_name_have_other_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers or images do; the number of the first namespace of processes is the same on all."""
    own = Peer.here(0)
    monkeypatch.setattr(Path, "read_text", lambda _: "another boot\n")
    other = replace(Peer.here(1), pid=NO_PROCESS)
    assert own.host == other.host
    assert Neighbours([own, other], 0).lost() == []
