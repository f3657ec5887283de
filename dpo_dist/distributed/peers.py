"""Detect dead and failed processes of the run, so that exactly one process prints what happened.

A process that is blocked in a collective call cannot be reached by another collective call, and if it waits
for a CUDA kernel it runs no signal handler either. Failures are therefore recorded in the key-value store in
which the processes met, and a thread of each process looks for them and for dead processes of its host.
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

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Peer:
    """Where a rank runs; `namespace` is that of its process number, another one in each container."""

    rank: int
    host: str
    pid: int
    namespace: str = ""

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """This process."""
        namespace = ""
        with contextlib.suppress(OSError):  # Linux only
            namespace = str(Path("/proc/self/ns/pid").readlink())
        return cls(rank, socket.gethostname(), os.getpid(), namespace)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; only for a peer on this host."""
        try:
            return bool(psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False


class Neighbours:
    """The other processes of the run on this host. One that another container hides is not among them."""

    def __init__(self, peers: Sequence[Peer], rank: int):
        own = peers[rank]
        here = [peer for peer in peers if (peer.host, peer.namespace) == (own.host, own.namespace)]
        self._visible = [peer for peer in here if peer is not own]
        self._own, self._size = own, len(peers)

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._own.rank

    @property
    def lowest_rank_but_0(self) -> int:
        """Of the processes of the run on this host; 0 if there is no other."""
        ranks = [peer.rank for peer in (self._own, *self._visible) if peer.rank > 0]
        return min(ranks, default=0)

    def lost(self) -> list[Peer]:
        """Return those that have died."""
        return [peer for peer in self._visible if not peer.is_alive]

    def lost_error(self, lost: Sequence[Peer], got: str) -> PeerLostError:
        """Return the error that names the dead; the survivor of the lowest rank on this host prints it."""
        error = PeerLostError(
            f"rank {', '.join(str(peer.rank) for peer in lost)} of {self._size} died",
            where="; ".join(f"rank {p.rank}: process {p.pid} on {p.host}" for p in lost),
            got=got,
            remedy="see its logs/rank-N.log (if that ends without an error, the process was killed, often "
            "for lack of host memory); the same command again resumes from the last checkpoint",
        )
        survivors = [peer.rank for peer in self._visible if peer not in lost]
        error.reporting_rank = min([self._own.rank, *survivors])
        return error


class FailureRecord:
    """The first failure of the run, in the key-value store of the launcher; thread-safe.

    Where the store cannot be reached, nothing is recorded, and known is what was read before.
    """

    def __init__(self, size: int):
        self._store = _store() if size > 1 else None
        self._size = size
        self._known: int | None = None

    def report(self, exit_code: int) -> bool | None:
        """Record that this process ends with `exit_code`.

        Returns:
            Whether it is the first to fail, and so the one that prints why; None if that cannot be known.
        """

        def add(store: Store) -> bool:
            is_first = bool(store.add(_FAILURES, 1) == 1)
            if is_first:
                store.set(_EXIT_CODE, str(exit_code))
            return is_first

        return True if self._size == 1 else self._ask(add)

    def exit_code(self) -> int | None:
        """Return the exit code of the first failure, None if there is none."""
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
        """What the store answers; None if it is gone, or silent, and then it is not asked again.

        A call has no time limit of its own: it waits for ever for a host that hangs.
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


def settle(error: DpoDistError, rank: int, record: FailureRecord) -> None:
    """Report `error`, choose who prints it (this process or `NOBODY`), and give the others time to follow."""
    is_first = record.report(error.exit_code)
    error.reporting_rank = rank if is_first or (is_first is None and rank == 0) else NOBODY
    record.wait_for_all(FAREWELL_SECONDS)


def nobody_answered(
    failure: BaseException, neighbours: Neighbours, record: FailureRecord
) -> PeerLostError | None:
    """Return `failure` as an error for the user if a collective call waited in vain for a living process.

    The first that finds out prints it; where that cannot be known, one process of each host: on the host that
    has the store, and may be the silent one, the one of the second rank.
    """
    told = (str(failure).splitlines() or [""])[0]
    if not isinstance(failure, RuntimeError) or not re.search("timed ?out|timeout", told, re.IGNORECASE):
        return None
    error = PeerLostError(
        "a process of the run does not answer",
        got=told[:300],
        expected="an answer within parallelism.timeout_seconds",
        remedy="see which logs/rank-N.log was the first to fall silent (its node, network or file system may "
        "hang) and end that process; the same command again resumes from the last checkpoint",
    )
    rank, is_first = neighbours.rank, record.report(error.exit_code)
    speaks = rank == neighbours.lowest_rank_but_0 if is_first is None else is_first
    error.reporting_rank = rank if speaks else NOBODY
    record.wait_for_all(FAREWELL_SECONDS)
    return error


def failed_elsewhere(exit_code: int) -> PeerLostError:
    """Return the error, which nobody prints, of a process that ends because another one failed."""
    error = PeerLostError(
        "another process of the run failed",
        remedy="see the error on the screen or in the other logs/rank-N.log",
    )
    error.exit_code, error.reporting_rank = exit_code, NOBODY
    return error


class Monitor(threading.Thread):
    """Ends this process if another one failed and the main thread cannot: it is blocked in a collective call.

    Args:
        tell: prints an error on the screen.
    """

    def __init__(self, neighbours: Neighbours, rank: int, record: FailureRecord, tell: Tell):
        super().__init__(name="peers", daemon=True)
        self._neighbours, self._rank, self._record, self._tell = neighbours, rank, record, tell
        self._stopping = threading.Event()
        self._ending = threading.Lock()

    def run(self) -> None:
        """Look for failures until `stop`; the main thread gets the time to find out by itself."""
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
        """Leave the end of this process to the caller."""
        with self._ending:
            self._stopping.set()

    def _end(self, lost: Sequence[Peer]) -> None:
        """End the process; of those that saw their neighbours die unrecorded, one says so."""
        exit_code = self._record.exit_code()
        if exit_code is not None or not lost:
            os._exit(exit_code or PeerLostError.exit_code)
        error = self._neighbours.lost_error(lost, "this process waits for it in vain")
        if error.reporting_rank == self._rank and self._record.report(error.exit_code) is not False:
            self._tell(error.block())
        # Whoever leaves now would be counted among the dead by survivors that are still looking.
        time.sleep(FAREWELL_SECONDS)
        os._exit(error.exit_code)


def _store() -> Store | None:
    """Connect to the store in which the processes met; None if it is gone."""
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
