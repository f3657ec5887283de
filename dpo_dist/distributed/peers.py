"""The processes of the run, and those of this host that have died or are stopped."""

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dpo_dist.errors import PeerLostError


@dataclass(frozen=True)
class Peer:
    """Host and process of a rank; `namespace` is that of `pid`, and differs between boots and containers."""

    rank: int
    host: str
    pid: int
    namespace: str = ""

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """Return the peer that this process is."""
        namespace = ""
        with contextlib.suppress(OSError):  # Linux only
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        return cls(rank, socket.gethostname(), os.getpid(), namespace)

    @property
    def place(self) -> tuple[str, str]:
        """Return the host and the container of the process: hosts of one name differ in their boots."""
        return self.host, self.namespace

    @property
    def is_alive(self) -> bool:
        """Return whether the process runs; only for a peer on this host."""
        try:
            return bool(psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    @property
    def is_stopped(self) -> bool:
        """Return whether a signal or a debugger stops the process; only for a peer on this host."""
        try:
            return psutil.Process(self.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Neighbours:
    """The other processes of the run on this host, without those hidden in other containers."""

    def __init__(self, peers: Sequence[Peer], rank: int):
        own = peers[rank]
        here = [peer for peer in peers if peer.place == own.place]
        self._visible = [peer for peer in here if peer is not own]
        self._own, self._size = own, len(peers)

    @property
    def rank(self) -> int:
        """Return the rank of this process."""
        return self._own.rank

    @property
    def lowest_rank_but_0(self) -> int:
        """Return the lowest rank above 0 on this host; 0 if there is none."""
        ranks = [peer.rank for peer in (self._own, *self._visible) if peer.rank > 0]
        return min(ranks, default=0)

    def lost(self) -> list[Peer]:
        """Return the processes that have died."""
        return [peer for peer in self._visible if not peer.is_alive]

    def is_stopped(self, peer: Peer) -> bool:
        """Return whether a peer is seen to be stopped: one that is on this host."""
        return peer in self._visible and peer.is_stopped

    def lost_error(self, lost: Sequence[Peer], got: str) -> PeerLostError:
        """Return the error that names the dead processes; the lowest survivor of this host prints it."""
        error = PeerLostError(
            f"rank {', '.join(str(peer.rank) for peer in lost)} of {self._size} died",
            where="; ".join(f"rank {p.rank}: process {p.pid} on {p.host}" for p in lost),
            got=got,
            remedy="see its logs/rank-N.log (if that ends without an error, the process was killed, often "
            "for lack of host memory); run the same command again to resume from the last checkpoint",
        )
        survivors = [peer.rank for peer in self._visible if peer not in lost]
        error.reporting_rank = min([self._own.rank, *survivors])
        return error
