"""Which processes of a run have failed, died or are stopped, and which one prints the error.

A process that is blocked in a collective call cannot be reached by another collective call, and while it
waits for a CUDA kernel it runs no signal handler either. Failures are therefore recorded in the key-value
store of the rendezvous, which a thread of each process reads.
"""

import contextlib
import faulthandler
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from dpo_dist.distributed.memory import out_of_memory
from dpo_dist.distributed.processes.world import Peer, World
from dpo_dist.foundation.errors import (
    DpoDistError,
    ExitCode,
    PeerLostError,
    StoppedError,
    disk_error,
    first_line,
)
from dpo_dist.foundation.signals import end_with_launcher, exit_callbacks, exit_on_signal, raise_terminated

T = TypeVar("T")

FAREWELL_SECONDS = 5.0
GRACE_SECONDS = 8.0
PATIENCE_SECONDS = 10.0
STORE_SECONDS = 10.0
_PATIENCE_AFTER_SIGTERM_SECONDS = 1.0
_NAMING_SECONDS = 10.0
_POLL_SECONDS = 1.0
_EXIT_CODE, _FAILURES = "exit_code", "failures"
# Errors that the end of another process may cause, in a collective call or by SIGTERM of the launcher.
_POSSIBLE_CONSEQUENCES = (RuntimeError, OSError, SystemExit, StoppedError)
# Of gloo, NCCL and the store of the rendezvous.
_COMMUNICATION_ERRORS = (
    r"timed ?out|timeout|closed by peer|reset by peer|broken pipe|remote process exited"
    r"|connection was likely closed|connectFullMesh failed"
)


@dataclass(frozen=True)
class Reports:
    """How any thread prints: an error, on any rank; a line, on rank 0; stacks of threads, to a file."""

    show: Callable[[str], None] = print
    say: Callable[[str], None] = print
    stacks: Path | None = None


class FailureRecord:
    """The first failure of the run, in the store of rank 0 or of its launcher; thread-safe.

    The client of the store has no timeout for a host that hangs, so only threads that nobody waits for ask.
    """

    def __init__(self, size: int):
        self._size, self._store = size, _connect() if size > 1 else None
        self._exit_code: int | None = None
        self._is_idle = threading.Lock()

    def _ask(self, question: Callable[[Store], T]) -> T | None:
        """Return the answer of the store; None if it does not answer in time."""
        store, answers = self._store, list[T]()
        if store is None or not self._is_idle.acquire(timeout=STORE_SECONDS):
            return None

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question(store))
            self._is_idle.release()

        asking = threading.Thread(target=ask, name="rendezvous", daemon=True)
        asking.start()
        asking.join(STORE_SECONDS)
        return answers[0] if answers else None

    @property
    def exit_code(self) -> int | None:
        """Return the exit code of the first failure; None if no process failed or the store does not answer.

        Once read it is known for good: the store may end with the process that failed.
        """
        if self._exit_code is None:
            self._exit_code = self._ask(
                lambda store: int(store.get(_EXIT_CODE)) if store.check([_EXIT_CODE]) else None
            )
        return self._exit_code

    def report(self, exit_code: int) -> bool | None:
        """Record the end of this process; return whether it failed first, and therefore prints the error.

        None: the store cannot be reached.
        """

        def add(store: Store) -> bool:
            is_first = bool(store.add(_FAILURES, 1) == 1)
            if is_first:
                store.set(_EXIT_CODE, str(exit_code))
            return is_first

        return True if self._size == 1 else self._ask(add)

    def wait_for_all(self) -> None:
        """Wait until every process has reported, at most `FAREWELL_SECONDS`.

        The other survivors would count this process as dead if it exited before.
        """
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self._size > 1 and time.monotonic() < deadline:
            if (self._ask(lambda store: int(store.add(_FAILURES, 0))) or 0) >= self._size:
                return
            time.sleep(0.05)


def _connect() -> Store | None:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with contextlib.suppress(RuntimeError):
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
        return PrefixStore(f"dpo_dist/{attempt}", store)
    return None


class Watcher(threading.Thread):
    """Thread that ends this process if another one failed, died or is stopped, and this one does not notice.

    After the world's `timeout_seconds` it ends a collective call, or a stopped process of this host.
    """

    def __init__(self, world: World, reports: Reports):
        super().__init__(name="watcher", daemon=True)
        self.record = FailureRecord(world.size)
        self._world, self._reports = world, reports
        place = world.peers[world.rank].place  # those in other containers are hidden
        self._neighbours = [peer for peer in world.peers if peer.place == place and peer.rank != world.rank]
        self._stopped = dict.fromkeys(self._neighbours, 0.0)
        self._is_over = threading.Event()
        self._ending = threading.Lock()

    def run(self) -> None:
        """Watch until `stop`; a grace period lets the main thread detect failures by itself."""
        while not self._is_over.wait(_POLL_SECONDS):
            for peer in self._neighbours:
                is_stopped = peer.status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
                self._stopped[peer] = self._stopped[peer] + _POLL_SECONDS if is_stopped else 0.0
            if not self._others_ended() or self._is_over.wait(GRACE_SECONDS):
                continue
            with self._ending:
                if not self._is_over.is_set():
                    self._end_process()

    def stop(self) -> None:
        """Stop watching; after this call the thread does not end the process.

        A thread that is still waiting for torch's store would abort the process as the interpreter ends.
        """
        with self._ending:
            self._is_over.set()
        if self.is_alive():
            self.join(2 * _POLL_SECONDS)

    def _others_ended(self) -> bool:
        return self.record.exit_code is not None or bool(self._died() or self._long_stopped())

    def _died(self) -> list[Peer]:
        return [peer for peer in self._neighbours if peer.status == psutil.STATUS_ZOMBIE]

    def _long_stopped(self) -> list[Peer]:
        """Return the processes that were stopped for the whole timeout, by this process's clock."""
        return [peer for peer, seconds in self._stopped.items() if seconds >= self._world.timeout_seconds]

    def _end_process(self) -> None:
        write_stacks(self._reports.stacks, "the run ends, and the main thread does not notice")
        if (exit_code := self.record.exit_code) is not None:
            os._exit(exit_code)
        error = self._lost("this process waits for it in a collective call")
        if self._has_to_print(error):
            self._reports.show(error.block())
        self.record.wait_for_all()
        os._exit(error.exit_code)

    def _has_to_print(self, error: DpoDistError) -> bool:
        """Record `error`; return whether this process prints it.

        That is the first to fail, or, where no store answers, the lowest living rank of each host: above 0,
        whose host has the store and may be the one that hangs.
        """
        is_first = self.record.report(error.exit_code)
        if is_first is not None:
            return is_first
        lost = [*self._died(), *self._long_stopped()]
        living = [peer.rank for peer in self._neighbours if peer not in lost] + [self._world.rank]
        return self._world.rank == min([rank for rank in living if rank > 0], default=0)

    def _reported(self, error: DpoDistError) -> DpoDistError:
        error.is_printed_here = self._has_to_print(error)
        self.record.wait_for_all()
        return error

    def report_failure(self, failure: BaseException) -> DpoDistError | None:
        """Return a failure of the main thread as an error that has been reported; None for a bug or a signal.

        A failure that another process caused becomes a `PeerLostError`.
        """
        if self._world.size > 1:
            failure = _origin(failure)
        error = failure if isinstance(failure, DpoDistError) else disk_error(failure)
        if isinstance(failure, torch.OutOfMemoryError):
            error = out_of_memory(failure)
        if error is not None and not (isinstance(error, StoppedError) and self._others_ended()):
            return self._reported(error)
        if self._world.size > 1 and isinstance(failure, _POSSIBLE_CONSEQUENCES):
            consequence = self._consequence(failure)
            if consequence is not None:
                return consequence
        code = failure.code if isinstance(failure, SystemExit) else None
        if isinstance(failure, KeyboardInterrupt):
            code = ExitCode.interrupted
        self.record.report(code if isinstance(code, int) else ExitCode.failed)
        self.record.wait_for_all()
        return None

    def _consequence(self, failure: BaseException) -> DpoDistError | None:
        """Return the error of another process that caused `failure`; that process may still be dying."""
        text = first_line(failure)
        is_signal = isinstance(failure, SystemExit)
        deadline = time.monotonic() + (_PATIENCE_AFTER_SIGTERM_SECONDS if is_signal else PATIENCE_SECONDS)
        while time.monotonic() < deadline:
            if (exit_code := self.record.exit_code) is not None:
                return self._failed_elsewhere(exit_code)
            if self._died() or self._long_stopped():
                return self._reported(self._lost(text))
            time.sleep(0.2)
        if not is_communication_error(text):
            return None
        write_stacks(self._reports.stacks, text)
        error = self._missing(text)
        exit_code = self.record.exit_code
        return self._reported(error) if exit_code is None else self._failed_elsewhere(exit_code)

    def _failed_elsewhere(self, exit_code: int) -> PeerLostError:
        """Return the error of a process that ends because another one failed; no rank prints it."""
        self.record.report(exit_code)
        error = PeerLostError(
            "another process of the run failed",
            remedy="see the error on the screen or in the other logs/rank-N.log",
        )
        error.exit_code, error.is_printed_here = exit_code, False
        return error

    def _lost(self, got: str) -> PeerLostError:
        """Return the error that names the processes of this host that died or are stopped."""
        died = self._died()
        what = "died" if died else "does not answer: it is stopped, by a signal or a debugger"
        return self._error(died or self._long_stopped(), what, got)

    def _missing(self, got: str) -> PeerLostError:
        """Return the error of a call that waited in vain; it names the ranks that miss a last barrier."""
        seconds = min(_NAMING_SECONDS, self._world.timeout_seconds / 2)
        missing: list[int] = []
        try:
            timeout = timedelta(seconds=seconds)
            dist.monitored_barrier(self._world.control, timeout, wait_all_ranks=True)
        except RuntimeError as error:
            named = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            missing = [int(rank) for rank in named[1].split(",")] if named else [0] * (self._world.rank > 0)
        if self._world.rank > 0:  # rank 0 alone knows the others that are missing
            deadline = time.monotonic() + FAREWELL_SECONDS
            while self.record.exit_code is None and time.monotonic() < deadline:
                time.sleep(0.1)
        what = f"does not answer within parallelism.timeout_seconds ({self._world.timeout_seconds:.0f})"
        if not missing:
            what = "waits in another call than the other ranks"
        return self._error([self._world.peers[rank] for rank in missing or [self._world.rank]], what, got)

    def _error(self, lost: Sequence[Peer], what: str, got: str) -> PeerLostError:
        return PeerLostError(
            f"rank {', '.join(str(peer.rank) for peer in lost)} of {self._world.size} {what}",
            where="; ".join(map(str, lost)),
            got=got[:300],
            remedy="see its logs/rank-N.log (if that ends without an error, the process was killed, often "
            "for lack of host memory) and logs/rank-N.stacks.txt; end a process that hangs; run the same "
            "command again to resume from the last checkpoint",
        )


def write_stacks(file: Path | None, reason: str) -> None:
    """Add the stacks of all threads to a file; one that cannot be written is ignored."""
    if file is None:
        return
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    with contextlib.suppress(OSError), file.open("a") as opened:
        opened.write(f"{now} process {os.getpid()} on {socket.gethostname()}: {reason}\n")
        opened.flush()
        faulthandler.dump_traceback(opened, all_threads=True)


def is_communication_error(text: str) -> bool:
    """Return whether the text of an error says that a call waited too long for a rank, or was cut off."""
    return bool(re.search(_COMMUNICATION_ERRORS, text, re.IGNORECASE))


def _origin(failure: BaseException) -> BaseException:
    """Return the error of communication behind `failure`; `failure` itself if there is none.

    Code that loads a model or reads files blames them for any error, also for one of a collective call.
    """
    error: BaseException | None = failure
    while error is not None:
        if isinstance(error, RuntimeError) and is_communication_error(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return failure


@contextlib.contextmanager
def watch_world(world: World, reports: Reports) -> Iterator[None]:
    """End all processes if one of them ends inside the block; exactly one prints the error.

    Entry is collective, and so is exit without an error. An error that leaves the block has
    `is_printed_here` set. A failure that another process caused becomes a `PeerLostError`. Reports are used
    also if the main thread is blocked.
    """
    watcher = Watcher(world, reports)
    previous = signal.getsignal(signal.SIGTERM)
    may_end_at_once = previous is signal.SIG_DFL  # a verb with progress to save has its own handler
    if may_end_at_once:
        _handle_sigterm(raise_terminated)
    if world.size > 1:
        watcher.start()
    try:
        # A rank that is still connecting when another dies would count survivors that exit as dead.
        if world.size > 1:
            dist.barrier(group=world.control)
        exit_callbacks.append(watcher.record.report)
        with contextlib.ExitStack() as stack:
            if may_end_at_once:
                stack.enter_context(exit_on_signal())
                stack.enter_context(end_with_launcher())
            yield
        world.barrier()
    except BaseException as failure:
        # The launcher sends SIGTERM more than once, and this process has not printed its error yet.
        _handle_sigterm(signal.SIG_IGN)
        watcher.stop()
        error = watcher.report_failure(failure)
        if world.size == 1:  # without other ranks the process may survive the error, as in a notebook
            _handle_sigterm(previous)
        if error is not None and error is not failure:
            raise error from failure
        raise
    finally:
        exit_callbacks.clear()
        watcher.stop()
    _handle_sigterm(previous)


def _handle_sigterm(handler: Any) -> None:
    """Set the handler of SIGTERM; outside of the main thread, where Python cannot, nothing is changed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
