"""The processes of a run: who there is, what they say to each other, and who has gone."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.ops
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from dpo_dist.distributed.device_memory import out_of_memory
from dpo_dist.distributed.peers import (
    FAREWELL_SECONDS,
    NOBODY,
    FailureRecord,
    Monitor,
    Neighbours,
    Peer,
    Tell,
    failed_elsewhere,
    nobody_answered,
    settle,
)
from dpo_dist.distributed.signals import raise_terminated
from dpo_dist.errors import DpoDistError, ExitCode, disk_error

T = TypeVar("T")

_PEER_PATIENCE_SECONDS = 10.0
_BEAT_SECONDS = 5.0
_MAY_FOLLOW = (RuntimeError, OSError, SystemExit, KeyboardInterrupt)
"""What the end of another process may cause: from a collective call, or by the signal of the launcher."""

WhileWaiting = Callable[[float], None]
"""Called every few seconds of long work with the seconds since its start."""


@dataclass(frozen=True)
class World:
    """All processes of the run, seen from one. Every method is collective unless it says otherwise.

    `control` is a process group on the host, for what ranks tell each other outside of steps. Like every
    other group it waits `timeout_seconds`, longer only for a rank that shows that it works (`while_waiting`).
    """

    accelerator: Any
    rank: int
    size: int
    device: torch.device
    peers: tuple[Peer, ...]
    control: Any = None
    timeout_seconds: int = 600

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints; not collective."""
        return self.rank == 0

    @property
    def is_first_of_host(self) -> bool:
        """Whether no rank below this one runs on the same host; not collective."""
        here = [peer.host for peer in self.peers if peer.rank == self.rank]
        return not any(peer.host in here for peer in self.peers[: self.rank])

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.control)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on all ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, work: Callable[[], T], while_waiting: WhileWaiting | None = None) -> T:
        """Do `work` on rank 0 and give its result to all; an error of rank 0 is raised on all (law L2).

        Args:
            while_waiting: given if `work` may take longer than a collective call waits; called on rank 0.
        """
        outcome: list[Any] = [None, None]
        try:
            with self._alive(while_waiting):
                if self.is_main:
                    outcome[0] = work()
        except DpoDistError as error:
            outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def together(self, work: Callable[[], T], while_waiting: WhileWaiting | None = None) -> T:
        """Do `work` on every rank; if one fails with a `DpoDistError`, all raise the first one.

        Args:
            while_waiting: given if `work` may take longer than a collective call waits; called on every rank.
        """
        error: DpoDistError | None = None
        result: T | None = None
        try:
            with self._alive(while_waiting):
                result = work()
        except DpoDistError as raised:
            error = raised
        first = next((e for e in self.gather(error) if e is not None), None)
        if first is not None:
            raise first
        assert result is not None or error is None
        return result  # type: ignore[return-value]

    @contextlib.contextmanager
    def _alive(self, while_waiting: WhileWaiting | None) -> Iterator[None]:
        """Within it, a thread shows the other ranks that this one works; ends when no rank works any more.

        Collective if `while_waiting` is given.
        """
        if while_waiting is None:
            yield
            return
        done = threading.Event()
        failures: list[BaseException] = []

        def beat() -> None:
            started, beat_seconds = time.monotonic(), min(_BEAT_SECONDS, self.timeout_seconds / 4)
            try:
                anyone_works = torch.ones(1)
                while anyone_works.item():
                    if not done.wait(beat_seconds):
                        while_waiting(time.monotonic() - started)
                    anyone_works.fill_(not done.is_set())
                    dist.all_reduce(anyone_works, op=dist.ReduceOp.MAX, group=self.control)
            except Exception as failure:  # raised below, in the main thread
                failures.append(failure)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if failures:
            raise failures[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` added over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: how ranks agree on stopping."""
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    @contextlib.contextmanager
    def watch(self, tell: Tell = print) -> Iterator[None]:
        """Within it, the end of one process ends all, and exactly one of them prints why.

        Entering it is collective, and leaving it if nothing failed. An error that leaves it has
        `reporting_rank` set. A failure that only followed from another process's becomes a `PeerLostError`,
        printed by the first survivor if that process died, and by nobody if it printed its own error.

        Args:
            tell: prints a block on the screen, from whichever rank, if the main thread is blocked.
        """
        neighbours = Neighbours(self.peers, self.rank)  # before connecting, in which time one may die
        record = FailureRecord(self.size)
        monitor = Monitor(neighbours, self.rank, record, tell)
        previous = signal.signal(signal.SIGTERM, raise_terminated)
        if self.size > 1:
            monitor.start()
        try:
            # A rank that still connects when another dies would take leaving survivors for dead.
            self.barrier()
            yield
            self.barrier()
        except BaseException as failure:
            # The launcher asks more than once, and this process has still to say why it ends.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            monitor.stop()
            error = _for_the_user(failure)
            if error is not None:
                settle(error, self.rank, record)
            elif isinstance(failure, _MAY_FOLLOW):
                error = self._consequence(failure, neighbours, record)
            if error is None:  # a fault of the program, which keeps its traceback
                record.report(ExitCode.failed)
                record.wait_for_all(FAREWELL_SECONDS)
            if error is None or error is failure:
                raise
            raise error from failure
        monitor.stop()
        signal.signal(signal.SIGTERM, previous)

    def _consequence(
        self, failure: BaseException, neighbours: Neighbours, record: FailureRecord
    ) -> DpoDistError | None:
        """Return the error of another process that `failure` follows from; that one may still be dying."""
        deadline = time.monotonic() + _PEER_PATIENCE_SECONDS
        while time.monotonic() < deadline:
            exit_code, lost = record.exit_code(), neighbours.lost()
            if exit_code is not None:
                record.report(exit_code)
                return failed_elsewhere(exit_code)
            if lost:
                error = neighbours.lost_error(lost, _one_line(failure))
                # The other survivors are looking who is gone; who leaves now would be counted among the dead.
                time.sleep(FAREWELL_SECONDS)
                if error.reporting_rank == self.rank and record.report(error.exit_code) is False:
                    error.reporting_rank = NOBODY
                return error
            time.sleep(0.2)
        return nobody_answered(failure, neighbours, record)


def start_world(deepspeed_config: dict[str, Any], timeout_seconds: int) -> World:
    """Join the processes that the launcher started; without a launcher, a world of one.

    Args:
        deepspeed_config: the policy's, of `zero.policy_config`. It must exist before weights are loaded.
        timeout_seconds: how long a collective call may wait for the other ranks.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    # Accelerate reads the accumulation from the environment, over its argument; ours is per step.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    # DeepSpeed would compile an all-reduce of its own for CPUs at first use; gloo needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # For groups that DeepSpeed and torch make without saying how long they wait.
    timeout = timedelta(seconds=timeout_seconds)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(
        mixed_precision="no",  # precision is DeepSpeed's, by model.dtype; the environment would change it
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)],
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    rank, size = accelerator.process_index, accelerator.num_processes
    peers: list[Any] = [None] * size
    dist.all_gather_object(peers, Peer.here(rank), group=control)
    return World(accelerator, rank, size, accelerator.device, tuple(peers), control, timeout_seconds)


def stop_world() -> None:
    """Leave the process group, and reset the libraries' state of it: this process may start another run."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    AcceleratorState._reset_state(reset_partial_state=True)


def _for_the_user(failure: BaseException) -> DpoDistError | None:
    """Return `failure` as an error for the user, None if it is none."""
    if isinstance(failure, torch.OutOfMemoryError):
        return out_of_memory(failure)
    return failure if isinstance(failure, DpoDistError) else disk_error(failure)


def _one_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
