"""Record of the first failure of the run, so that exactly one process prints the error.

A process that is blocked in a collective call cannot be reached by another collective call, and while it
waits for a CUDA kernel it runs no signal handler either. Failures are therefore recorded in the key-value
store of the rendezvous, which a thread of each process reads (`monitor`).
"""

import contextlib
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from dpo_dist.distributed.memory import out_of_memory
from dpo_dist.foundation.errors import DpoDistError, ExitCode, PeerLostError, disk_error
from dpo_dist.foundation.files import open_in_place

STORE_SECONDS = 10

T = TypeVar("T")


class RendezvousStore:
    """The store of rank 0, or of its launcher; thread-safe.

    The client of the store has no timeout for a host that hangs, and a network may return: a question that
    hangs is given up, and others are not asked until it ends.

    Args:
        size: number of ranks; a single rank has no store.
    """

    def __init__(self, size: int):
        self.address = os.environ.get("MASTER_ADDR", "")
        self._store = _connect() if size > 1 else None
        self._hanging: threading.Thread | None = None
        self._silent_since: float | None = None

    @property
    def silent_seconds(self) -> float:
        """Return the seconds since the store stopped to answer; 0 if it answers."""
        return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since

    def ask(self, question: Callable[[Store], T], seconds: float | None = None) -> T | None:
        """Return the answer of the store; None if it does not answer within `seconds` (`STORE_SECONDS`)."""
        store, answers = self._store, list[T]()
        if store is None or (self._hanging is not None and self._hanging.is_alive()):
            return None

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question(store))

        asked = time.monotonic()
        asking = threading.Thread(target=ask, name="rendezvous", daemon=True)
        asking.start()
        asking.join(STORE_SECONDS if seconds is None else seconds)
        self._hanging = asking if asking.is_alive() else None
        if answers:
            self._silent_since = None
            return answers[0]
        self._silent_since = self._silent_since or asked
        return None


def _connect() -> Store | None:
    """Return a connection to the store; None if the store is gone."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with contextlib.suppress(RuntimeError):
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=STORE_SECONDS),
        )
        return PrefixStore(f"dpo_dist/{attempt}", store)
    return None


class StackFile:
    """Adds stacks to a file; thread-safe, and a file that cannot be written is ignored.

    Args:
        path: of the file; None: nothing is written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._written = ""
        self._writing = threading.Lock()

    def write(self, reason: str) -> None:
        """Add the stacks of all threads, once for each reason."""
        with self._writing:
            if self.path is None or self._written == reason:
                return
            self._written = reason
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            with contextlib.suppress(OSError), open_in_place(self.path, "a") as file:
                file.write(f"{now} process {os.getpid()} on {socket.gethostname()}: {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")


NOBODY = -1
FAREWELL_SECONDS = 5.0
_FAILURES, _EXIT_CODE, _STACKS = "failures", "exit_code", "stacks"


class FailureRecord:
    """The first failure of the run; thread-safe.

    If the store cannot be reached, nothing is recorded, and only a failure read before is known.
    """

    def __init__(self, size: int, store: RendezvousStore):
        self._store, self._size = store, size
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

        return True if self._size == 1 else self._store.ask(add)

    def exit_code(self, seconds: float | None = None) -> int | None:
        """Return the exit code of the first failure; None without a failure, or without an answer in time."""
        if self._known is None:
            self._known = self._store.ask(
                lambda store: int(store.get(_EXIT_CODE)) if store.check([_EXIT_CODE]) else None, seconds
            )
        return self._known

    def ask_for_stacks(self) -> None:
        """Have every process write the stacks of its threads."""
        self._store.ask(lambda store: store.set(_STACKS, "1"))

    def wants_stacks(self, seconds: float | None = None) -> bool:
        """Return whether a process has asked for stacks."""
        return bool(self._store.ask(lambda store: store.check([_STACKS]), seconds))

    def wait_for_all(self, seconds: float) -> None:
        """Wait until every process has reported, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            reported = self._store.ask(lambda store: int(store.add(_FAILURES, 0)))
            if reported is None or reported >= self._size:
                return
            time.sleep(0.05)


def report_error(error: DpoDistError, rank: int, record: FailureRecord) -> None:
    """Record `error`, set its `reporting_rank` (this process or `NOBODY`), and wait for the others to end."""
    is_first = record.report(error.exit_code)
    error.reporting_rank = rank if is_first or (is_first is None and rank == 0) else NOBODY
    record.wait_for_all(FAREWELL_SECONDS)


def failed_elsewhere(exit_code: int) -> PeerLostError:
    """Return the error of a process that ends because another one failed; no rank prints it."""
    error = PeerLostError(
        "another process of the run failed",
        remedy="see the error on the screen or in the other logs/rank-N.log",
    )
    error.exit_code, error.reporting_rank = exit_code, NOBODY
    return error


def exit_code_of(failure: BaseException) -> int:
    """Return the exit code of a process that ends by a failure that is no error of the user."""
    if isinstance(failure, KeyboardInterrupt):
        return ExitCode.interrupted
    if isinstance(failure, SystemExit) and isinstance(failure.code, int):
        return failure.code
    return ExitCode.failed


def user_error(failure: BaseException) -> DpoDistError | None:
    """Return a failure as an error for the user; None for a bug or a signal."""
    if isinstance(failure, torch.OutOfMemoryError):
        return out_of_memory(failure)
    return failure if isinstance(failure, DpoDistError) else disk_error(failure)
