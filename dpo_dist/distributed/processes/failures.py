"""Find processes of a run that failed, died or are stopped; end the others, and let one print the error.

A process that is blocked in a collective call cannot take part in another collective call, and while it waits
for a CUDA kernel it runs no signal handler. Failures are therefore recorded in the rendezvous's key-value
store, which a thread of each process reads. torchelastic's agent ends the processes of its own node only, and
its error files (`record`) are of processes that can still write one: of a stopped process they blame another.
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
from dpo_dist.foundation.signals import (
    end_with_launcher,
    exit_callbacks,
    exit_on_signal,
    raise_terminated,
    stopped_by,
)
from dpo_dist.foundation.streams import keep_document

T = TypeVar("T")

FAREWELL_SECONDS = 5.0  # for the reports of all ranks
GRACE_SECONDS = 8.0  # in which the main thread may notice a failure: its error says more than the watcher's
PATIENCE_SECONDS = 10.0  # after a failed collective call, until its cause is seen
STORE_SECONDS = 10.0
_PATIENCE_AFTER_SIGTERM_SECONDS = 1.0  # its cause came before it
_NAMING_SECONDS = 10.0  # in which living ranks reach the last barrier
_POLL_SECONDS = 1.0
_EXIT_CODE = "exit_code"
_FAILURES = "failures"
# Errors that the end of another process can cause: in a collective call, or by the launcher's SIGTERM.
_ERRORS_OF_OTHERS = (RuntimeError, OSError, SystemExit, StoppedError)
# Words in errors of gloo, NCCL and the rendezvous's store.
_TIMEOUTS = r"timed ?out|timeout"
_COMMUNICATION_ERRORS = (
    rf"{_TIMEOUTS}|closed by peer|reset by peer|broken pipe|remote process exited"
    r"|connection was likely closed|connectFullMesh failed"
    # As systems name what this side or its network did: ECONNABORTED, ENOTCONN, EHOSTUNREACH, ENETDOWN ...
    r"|connection abort|not connected|no route to host|network is (?:unreachable|down)|host is down"
)


@dataclass(frozen=True)
class Reports:
    """Where threads write: `show` an error on any rank, `say` a line on rank 0, stacks to a file."""

    show: Callable[[str], None] = print
    say: Callable[[str], None] = print
    stacks: Path | None = None


class FailureRecord:
    """The run's first failure, in the store of rank 0 or of its launcher; thread-safe.

    The store's client has no timeout for a host that hangs; each call runs in a daemon thread, which is left
    alone after `STORE_SECONDS`.
    """

    def __init__(self, size: int):
        self._size = size
        self._store: Store | None = None
        if size > 1:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            with contextlib.suppress(RuntimeError):
                store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
                self._store = PrefixStore(f"dpo_dist/{attempt}", store)
        self._exit_code: int | None = None
        self._is_idle = threading.Lock()

    def _call_store(self, call: Callable[[Store], T]) -> T | None:
        """Return `call(store)`; None if the store cannot be reached in time."""
        store = self._store
        results = list[T]()
        if store is None or not self._is_idle.acquire(timeout=STORE_SECONDS):
            return None

        def run() -> None:
            with contextlib.suppress(RuntimeError):
                results.append(call(store))
            self._is_idle.release()

        thread = threading.Thread(target=run, name="rendezvous", daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)
        return results[0] if results else None

    @property
    def exit_code(self) -> int | None:
        """Return the first failure's exit code; None if no process failed or the store cannot be reached.

        The code is read once and kept, because the store may end with the process that failed.
        """
        if self._exit_code is None:
            self._exit_code = self._call_store(
                lambda store: int(store.get(_EXIT_CODE)) if store.check([_EXIT_CODE]) else None
            )
        return self._exit_code

    def report(self, exit_code: int) -> bool | None:
        """Record this process's end; return whether it failed first and must print the error.

        Returns None if the store cannot be reached.
        """

        def add(store: Store) -> bool:
            is_first = bool(store.add(_FAILURES, 1) == 1)
            if is_first:
                store.set(_EXIT_CODE, str(exit_code))
            return is_first

        return True if self._size == 1 else self._call_store(add)

    def wait_for_all(self) -> None:
        """Wait until every process has reported, at most `FAREWELL_SECONDS`.

        If this process exited earlier, the other survivors would count it as dead.
        """
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self._size > 1 and time.monotonic() < deadline:
            if (self._call_store(lambda store: int(store.add(_FAILURES, 0))) or 0) >= self._size:
                return
            time.sleep(0.05)


class Watcher(threading.Thread):
    """Thread that ends this process if another process failed, died or is stopped, and the main thread hangs.

    A process counts as stopped after the world's `timeout_seconds`.
    """

    def __init__(self, world: World, reports: Reports):
        super().__init__(name="watcher", daemon=True)
        self.record = FailureRecord(world.size)
        self._world = world
        self._reports = reports
        place = world.peers[world.rank].place  # processes in other containers cannot be seen
        on_node = (peer for peer in world.peers if peer.place == place)
        self._neighbours = [peer for peer in on_node if peer.rank != world.rank]
        self._stopped = dict.fromkeys(self._neighbours, 0.0)
        self._is_over = threading.Event()
        self._ending = threading.Lock()

    def run(self) -> None:
        """Watch until `stop`; the main thread has `GRACE_SECONDS` to notice a failure first."""
        while not self._is_over.wait(_POLL_SECONDS):
            for peer in self._neighbours:
                is_stopped = peer.status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
                self._stopped[peer] = self._stopped[peer] + _POLL_SECONDS if is_stopped else 0.0
            if not self._has_failed_peers() or self._is_over.wait(GRACE_SECONDS):
                continue
            with self._ending:
                if self._is_over.is_set():
                    return
                write_stacks(self._reports.stacks, "the run ends while the main thread hangs")
                exit_code = self.record.exit_code
                if exit_code is not None:
                    os._exit(exit_code)
                error = self._lost_error("this process waits in a collective call")
                if self._prints_error(error):
                    self._reports.show(error.block())
                self.record.wait_for_all()
                os._exit(error.exit_code)

    def stop(self) -> None:
        """Stop watching; after this call the thread does not end the process.

        Waits for the thread: if it still used torch's store when the interpreter ends, the process would
        abort.
        """
        with self._ending:
            self._is_over.set()
        if self.is_alive():
            self.join(2 * _POLL_SECONDS)

    def _has_failed_peers(self) -> bool:
        return self.record.exit_code is not None or bool(self._dead_peers() or self._stopped_peers())

    def _dead_peers(self) -> list[Peer]:
        return [peer for peer in self._neighbours if peer.status == psutil.STATUS_ZOMBIE]

    def _stopped_peers(self) -> list[Peer]:
        """Return the processes of this host that have been stopped for the whole timeout."""
        return [peer for peer, seconds in self._stopped.items() if seconds >= self._world.timeout_seconds]

    def _prints_error(self, error: DpoDistError) -> bool:
        """Record `error`; return whether this process prints it.

        The first process to fail prints. If the store cannot be reached, the lowest living rank of each host
        prints; not rank 0 if there is another, because rank 0's host, which has the store, may hang.
        """
        is_first = self.record.report(error.exit_code)
        if is_first is not None:
            return is_first
        lost = [*self._dead_peers(), *self._stopped_peers()]
        living = [peer.rank for peer in self._neighbours if peer not in lost] + [self._world.rank]
        return self._world.rank == min([rank for rank in living if rank > 0], default=0)

    def _report(self, error: DpoDistError) -> DpoDistError:
        error.is_printed_here = self._prints_error(error)
        self.record.wait_for_all()
        return error

    def report_failure(self, failure: BaseException) -> DpoDistError | None:
        """Record a failure of the main thread; return its error, or None for a bug or a signal.

        A failure that another process caused becomes a `PeerLostError`.
        """
        if self._world.size > 1:
            failure = _origin(failure)
        error = failure if isinstance(failure, DpoDistError) else disk_error(failure)
        if isinstance(failure, torch.OutOfMemoryError):
            error = out_of_memory(failure)
        if error is not None and not (isinstance(error, StoppedError) and self._has_failed_peers()):
            return self._report(error)
        if self._world.size > 1 and isinstance(failure, _ERRORS_OF_OTHERS):
            lost = self._wait_for_cause(failure)
            if lost is not None:
                return lost
        code = failure.code if isinstance(failure, SystemExit) else None
        if isinstance(failure, KeyboardInterrupt):
            code = ExitCode.interrupted
        is_first = self.record.report(code if isinstance(code, int) else ExitCode.failed)
        if is_first is False and isinstance(failure, Exception):
            keep_document(None)  # with --json, the first process prints the document
        self.record.wait_for_all()
        return None

    def _wait_for_cause(self, failure: BaseException) -> DpoDistError | None:
        """Wait for the process behind `failure` to end; return the error that names it, None if none did."""
        text = first_line(failure)
        is_signal = isinstance(failure, SystemExit)
        deadline = time.monotonic() + (_PATIENCE_AFTER_SIGTERM_SECONDS if is_signal else PATIENCE_SECONDS)
        while time.monotonic() < deadline:
            exit_code = self.record.exit_code
            if exit_code is not None:
                return self._follow_failure(exit_code)
            if self._dead_peers() or self._stopped_peers():
                return self._report(self._lost_error(text))
            time.sleep(0.2)
        if not is_communication_error(text):
            return None
        write_stacks(self._reports.stacks, text)
        error = self._timeout_error(text)
        exit_code = self.record.exit_code
        return self._report(error) if exit_code is None else self._follow_failure(exit_code)

    def _follow_failure(self, exit_code: int) -> DpoDistError:
        """Return the error of this process after another one failed; only that one prints an error."""
        self.record.report(exit_code)
        error: DpoDistError = PeerLostError(
            "another process of the run failed",
            remedy="see the error on the screen or in the other logs/rank-N.log",
        )
        if exit_code == ExitCode.preempted:  # scripts end at this error as at a stop of their own
            error = stopped_by("the stop of another process")
        error.exit_code = exit_code
        error.is_printed_here = False
        return error

    def _lost_error(self, got: str) -> PeerLostError:
        """Return the error that names the processes of this host that died or are stopped."""
        died = self._dead_peers()
        what = "died" if died else "does not answer: a signal or a debugger has stopped it"
        return self._error(died or self._stopped_peers(), what, got)

    def _timeout_error(self, got: str) -> PeerLostError:
        """Return the error of a call that timed out; names the ranks that miss a last barrier."""
        seconds = min(_NAMING_SECONDS, self._world.timeout_seconds / 2)
        missing: list[int] = []
        try:
            # In the group on the CPU: a kernel that hangs does not block it.
            timeout = timedelta(seconds=seconds)
            dist.monitored_barrier(self._world.control, timeout, wait_all_ranks=True)
        except RuntimeError as error:
            match = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            missing = [int(rank) for rank in match[1].split(",")] if match else [0] * (self._world.rank > 0)
        if self._world.rank > 0:  # let rank 0 report first: only rank 0 knows which other ranks are missing
            deadline = time.monotonic() + FAREWELL_SECONDS
            while self.record.exit_code is None and time.monotonic() < deadline:
                time.sleep(0.1)
        what = f"does not answer within parallelism.timeout_seconds ({self._world.timeout_seconds:.0f})"
        if not re.search(_TIMEOUTS, got, re.IGNORECASE):
            what = "does not answer: a connection of the run was lost"
            if not missing:
                what = "has lost a connection to another rank, and all ranks answer: see the network"
        elif not missing:
            what = "waits in a different collective call than the other ranks"
        return self._error([self._world.peers[rank] for rank in missing or [self._world.rank]], what, got)

    def _error(self, lost: Sequence[Peer], what: str, got: str) -> PeerLostError:
        return PeerLostError(
            f"rank {', '.join(str(peer.rank) for peer in lost)} of {self._world.size} {what}",
            where="; ".join(map(str, lost)),
            got=got[:300],
            remedy="see logs/rank-N.log and logs/rank-N.stacks.txt of this rank (a log without an error at "
            "its end: it was killed, often for want of host memory); run the command again to resume",
        )


def write_stacks(file: Path | None, reason: str) -> None:
    """Append the stacks of all threads to a file; ignores a file that cannot be written."""
    if file is None:
        return
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    with contextlib.suppress(OSError), file.open("a") as opened:
        opened.write(f"{now} process {os.getpid()} on {socket.gethostname()}: {reason}\n")
        opened.flush()
        faulthandler.dump_traceback(opened, all_threads=True)


def is_communication_error(text: str) -> bool:
    """Return whether an error's text says that a collective call timed out or lost its connection."""
    return bool(re.search(_COMMUNICATION_ERRORS, text, re.IGNORECASE))


def _origin(failure: BaseException) -> BaseException:
    """Return the communication error that caused `failure`; `failure` itself if no such error caused it.

    Without this, code that loads a model would blame the model's files for an error of a collective call.
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

    Entry is collective, and so is exit without an error. An error that leaves the block has `is_printed_here`
    set. A failure that another process caused becomes a `PeerLostError`. Another thread uses `reports` if the
    main thread is blocked.
    """
    watcher = Watcher(world, reports)
    previous = signal.getsignal(signal.SIGTERM)
    may_end_at_once = previous is signal.SIG_DFL  # else the verb handles SIGTERM to save its progress
    if may_end_at_once:
        _handle_sigterm(raise_terminated)
    if world.size > 1:
        watcher.start()
    try:
        # Wait until all ranks watch: one that joins after a death would take exiting survivors for dead.
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
        # Without this, another SIGTERM of the launcher would end this process before it prints its error.
        _handle_sigterm(signal.SIG_IGN)
        watcher.stop()
        error = watcher.report_failure(failure)
        if world.size == 1:  # the process may go on after the error, as in a notebook
            _handle_sigterm(previous)
        if error is not None and error is not failure:
            raise error from failure
        raise
    finally:
        exit_callbacks.clear()
        watcher.stop()
    _handle_sigterm(previous)


def _handle_sigterm(handler: Any) -> None:
    """Set the handler of SIGTERM; does nothing outside of the main thread, where Python cannot set one."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
