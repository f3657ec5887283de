"""Record of the first failure of the run, so that exactly one process prints the error.

A process that is blocked in a collective call cannot be reached by another collective call, and while it
waits for a CUDA kernel it runs no signal handler either. Failures are therefore recorded in the key-value
store of the rendezvous, which a thread of each process reads (`monitor`).
"""

import time

import torch
from torch._C._distributed_c10d import Store

from dpo_dist.distributed.device_memory import out_of_memory
from dpo_dist.distributed.rendezvous_store import RendezvousStore
from dpo_dist.errors import DpoDistError, ExitCode, PeerLostError, disk_error

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
