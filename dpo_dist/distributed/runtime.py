"""The processes of a run: who there is, what they say to each other, and who has gone."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.ops
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

from dpo_dist.errors import DpoDistError, PeerLostError

T = TypeVar("T")

_PEER_PATIENCE_SECONDS = 10.0
_FAREWELL_SECONDS = 3.0
_CONTROL_PATIENCE_HOURS = 12


@dataclass(frozen=True)
class Peer:
    """Where a rank runs."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True)
class World:
    """All processes of the run, seen from one. Every method is collective unless it says otherwise.

    `control` is a process group on the host, for what ranks tell each other outside of steps. It is patient:
    rank 0 may encode a data set or digest a model's files for hours while the others wait for it.
    """

    accelerator: Any
    rank: int
    size: int
    device: torch.device
    peers: tuple[Peer, ...]
    control: Any = None

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

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and give its result to all; an error of rank 0 is raised on all (law L2)."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except DpoDistError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if one fails with a `DpoDistError`, all raise the first one."""
        error: DpoDistError | None = None
        result: T | None = None
        try:
            result = work()
        except DpoDistError as raised:
            error = raised
        first = next((e for e in self.gather(error) if e is not None), None)
        if first is not None:
            raise first
        assert result is not None or error is None
        return result  # type: ignore[return-value]

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
    def watch(self) -> Iterator[None]:
        """Turn the failure that follows another rank's death into an error that says who died."""
        previous = signal.signal(signal.SIGTERM, _raise_terminated)
        try:
            yield
            signal.signal(signal.SIGTERM, previous)
        except BaseException as failure:
            # The launcher asks more than once, and this process has still to say why it ends.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            lost = [] if isinstance(failure, DpoDistError) else self._lost_peers()
            if not lost:
                raise
            error = PeerLostError(
                f"rank {', '.join(str(peer.rank) for peer in lost)} of {self.size} died",
                where="; ".join(f"rank {p.rank}: process {p.pid} on {p.host}" for p in lost),
                got=_one_line(failure),
                remedy="see its logs/rank-N.log; the same command again resumes from the last checkpoint",
            )
            error.speaker = self._first_survivor(lost)
            # The other survivors are looking who is gone; who leaves now would be counted among the dead.
            time.sleep(_FAREWELL_SECONDS)
            raise error from failure

    def _first_survivor(self, lost: list[Peer]) -> int:
        here = socket.gethostname()
        return min(peer.rank for peer in self.peers if peer.host == here and peer not in lost)

    def _lost_peers(self) -> list[Peer]:
        """Ranks of this host whose process is gone; waits a little, as a death is seen before it is done."""
        here = socket.gethostname()
        others = [peer for peer in self.peers if peer.host == here and peer.rank != self.rank]
        deadline = time.monotonic() + _PEER_PATIENCE_SECONDS
        while others:
            lost = [peer for peer in others if not _is_alive(peer.pid)]
            if lost or time.monotonic() > deadline:
                return lost
            time.sleep(0.2)
        return []


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
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(
        mixed_precision="no",  # precision is DeepSpeed's, by model.dtype; the environment would change it
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout_seconds))],
    )
    control = dist.new_group(backend="gloo", timeout=timedelta(hours=_CONTROL_PATIENCE_HOURS))
    me = Peer(accelerator.process_index, socket.gethostname(), os.getpid())
    peers: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(peers, me, group=control)
    return World(accelerator, me.rank, accelerator.num_processes, accelerator.device, tuple(peers), control)


def stop_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Terminated(SystemExit):
    """SIGTERM, as an exception."""


def _raise_terminated(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated(128 + signal.SIGTERM)


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _one_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
