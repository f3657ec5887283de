"""Detect dead and failed processes of the run, so that exactly one process prints the error.

A process that is blocked in a collective call cannot be reached by another collective call, and while it
waits for a CUDA kernel it runs no signal handler either. Failures are therefore recorded in the key-value
store of the rendezvous, and a thread of each process checks it, and the processes of its host.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from dpo_dist.errors import DpoDistError, PeerLostError

NOBODY = -1
FAREWELL_SECONDS = 5.0
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 8.0
_STORE_SECONDS = 10
_FAILURES, _EXIT_CODE = "failures", "exit_code"

T = TypeVar("T")


@dataclass(frozen=True)
class Peer:
    """Host and process of a rank; `namespace` is that of `pid`, and differs between containers."""

    rank: int
    host: str
    pid: int
    namespace: str = ""

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """Return the peer that this process is."""
        namespace = ""
        with contextlib.suppress(OSError):  # Linux only
            namespace = str(Path("/proc/self/ns/pid").readlink())
        return cls(rank, socket.gethostname(), os.getpid(), namespace)

    @property
    def is_alive(self) -> bool:
        """Return whether the process runs; only for a peer on this host."""
        try:
            return bool(psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


class Neighbours:
    """The other processes of the run on this host, without those hidden in other containers."""

    def __init__(self, peers: Sequence[Peer], rank: int):
        own = peers[rank]
        here = [peer for peer in peers if (peer.host, peer.namespace) == (own.host, own.namespace)]
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


class FailureRecord:
    """The first failure of the run, in the key-value store of the rendezvous; thread-safe.

    If the store cannot be reached, nothing is recorded, and only a failure read before is known.
    """

    def __init__(self, size: int):
        self._store = _store() if size > 1 else None
        self._size = size
        self._known: int | None = None

    def report(self, exit_code: int) -> bool | None:
        """Record that this process ends with `exit_code`.

        Returns:
            Whether this process failed first and prints the error; None if the store cannot be reached.
        """

        def add(store: Store) -> bool:
            is_first = bool(store.add(_FAILURES, 1) == 1)
            if is_first:
                store.set(_EXIT_CODE, str(exit_code))
            return is_first

        return True if self._size == 1 else self._ask(add)

    def exit_code(self) -> int | None:
        """Return the exit code of the first failure; None without a failure."""
        if self._known is None:
            self._known = self._ask(
                lambda store: int(store.get(_EXIT_CODE)) if store.check([_EXIT_CODE]) else None
            )
        return self._known

    def wait_for_all(self, seconds: float) -> None:
        """Wait until every process has reported, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            reported = self._ask(lambda store: int(store.add(_FAILURES, 0)))
            if reported is None or reported >= self._size:
                return
            time.sleep(0.05)

    def _ask(self, question: Callable[[Store], T]) -> T | None:
        """Return the store's answer; None if the store is gone or hangs. Then it is never asked again.

        The store's client has no timeout for a host that hangs.
        """
        store, answers = self._store, list[T]()
        if store is None:
            return None

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question(store))

        asking = threading.Thread(target=ask, name="failures", daemon=True)
        asking.start()
        asking.join(_STORE_SECONDS)
        if asking.is_alive():
            self._store = None
        return answers[0] if answers else None


def report_error(error: DpoDistError, rank: int, record: FailureRecord) -> None:
    """Record `error`, set its `reporting_rank` (this process or `NOBODY`), and wait for the others to end."""
    is_first = record.report(error.exit_code)
    error.reporting_rank = rank if is_first or (is_first is None and rank == 0) else NOBODY
    record.wait_for_all(FAREWELL_SECONDS)


def timeout_error(
    failure: BaseException, neighbours: Neighbours, record: FailureRecord
) -> PeerLostError | None:
    """Return `failure` as an error for the user if a collective call timed out; None otherwise.

    The first process to detect it prints it. If the store cannot be reached, one process of each host does:
    its lowest rank above 0, as rank 0's host has the store and may be the one that hangs.
    """
    message = (str(failure).splitlines() or [""])[0]
    if not isinstance(failure, RuntimeError) or not re.search("timed ?out|timeout", message, re.IGNORECASE):
        return None
    error = PeerLostError(
        "a process of the run does not answer",
        got=message[:300],
        expected="an answer within parallelism.timeout_seconds",
        remedy="find the logs/rank-N.log that stopped first (its node, network or file system may hang) and "
        "end that process; run the same command again to resume from the last checkpoint",
    )
    rank, is_first = neighbours.rank, record.report(error.exit_code)
    reports = rank == neighbours.lowest_rank_but_0 if is_first is None else is_first
    error.reporting_rank = rank if reports else NOBODY
    record.wait_for_all(FAREWELL_SECONDS)
    return error


def failed_elsewhere(exit_code: int) -> PeerLostError:
    """Return the error of a process that ends because another one failed; no rank prints it."""
    error = PeerLostError(
        "another process of the run failed",
        remedy="see the error on the screen or in the other logs/rank-N.log",
    )
    error.exit_code, error.reporting_rank = exit_code, NOBODY
    return error


class Monitor(threading.Thread):
    """Thread that ends this process if another one failed while the main thread is in a collective call.

    Args:
        show: prints an error on the screen.
    """

    def __init__(self, neighbours: Neighbours, rank: int, record: FailureRecord, show: Callable[[str], None]):
        super().__init__(name="peers", daemon=True)
        self._neighbours, self._rank, self._record, self._show = neighbours, rank, record, show
        self._stopping = threading.Event()
        self._ending = threading.Lock()

    def run(self) -> None:
        """Check for failures until `stop`; a grace period lets the main thread detect them by itself."""
        while not self._stopping.wait(_POLL_SECONDS):
            lost = self._neighbours.lost()
            if self._record.exit_code() is None and not lost:
                continue
            if self._stopping.wait(_GRACE_SECONDS):
                return
            with self._ending:
                if not self._stopping.is_set():
                    self._end(lost)

    def stop(self) -> None:
        """Stop checking; after this call the thread does not end the process."""
        with self._ending:
            self._stopping.set()

    def _end(self, lost: Sequence[Peer]) -> None:
        """End the process; if a process died without a record, one survivor prints the error."""
        exit_code = self._record.exit_code()
        if exit_code is not None or not lost:
            os._exit(exit_code or PeerLostError.exit_code)
        error = self._neighbours.lost_error(lost, "this process waits for it in a collective call")
        if error.reporting_rank == self._rank and self._record.report(error.exit_code) is not False:
            self._show(error.block())
        # The other survivors would count this process as dead if it exited now.
        time.sleep(FAREWELL_SECONDS)
        os._exit(error.exit_code)


def _store() -> Store | None:
    """Return a connection to the key-value store of the rendezvous; None if the store is gone."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with contextlib.suppress(RuntimeError):
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
        )
        return PrefixStore(f"dpo_dist/{attempt}", store)
    return None
