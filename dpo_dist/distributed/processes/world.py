"""The processes of a run: communication, agreement on errors and stops, and sequence parallelism."""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_dist.foundation.errors import ConfigError, DpoDistError
from dpo_dist.foundation.files import temporary_name, text_digest
from dpo_dist.foundation.process import note_progress
from dpo_dist.foundation.signals import BY_STEPS, BY_TRACKER, StopRequest, stopped_by
from dpo_dist.foundation.text import first_few, pluralize
from dpo_dist.foundation.user_code import loaded_sources
from dpo_dist.model.attention.ulysses import TokenExchange
from dpo_dist.model.experts import ExpertShare

T = TypeVar("T")

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed")
"""The packages whose code decides the numbers of a run, and which calls its ranks make."""
_SEEN_SECONDS = 10.0
_PATIENCE = timedelta(days=1)  # for a wait outside of steps, if a host hangs and its connections stay


@dataclass(frozen=True)
class Peer:
    """A rank's host and process; `place` identifies the host and container, even if hosts share a name."""

    rank: int
    host: str
    pid: int
    place: str

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """Return this process as a peer."""
        place = host = socket.gethostname()
        with contextlib.suppress(OSError):  # Linux only
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            place = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        return cls(rank, host, os.getpid(), place)

    @property
    def status(self) -> str:
        """Return the state of the process, as psutil names it; only for a peer on this host."""
        try:
            return str(psutil.Process(self.pid).status())
        except psutil.NoSuchProcess:
            return str(psutil.STATUS_ZOMBIE)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass(frozen=True)
class ShardGroup:
    """This rank's place among the `ranks` that shard one copy of the weights.

    `copies` is the process group of the ranks that have the same shards of other copies.
    """

    rank: int
    ranks: int
    copies: Any


@dataclass(frozen=True)
class ExpertGroup:
    """This rank's place among the `ranks` that share the experts of each layer, and its process groups.

    Tokens are sent in `exchange`; the ranks of `equal` have the same experts; `alone` has this rank only.
    """

    rank: int
    ranks: int
    exchange: Any
    equal: Any
    alone: Any


@dataclass(frozen=True)
class World:
    """The processes of the run, as one of them sees them. Methods are collective, properties are not.

    `control` is a CPU process group for communication outside of steps. Calls of every group time out after
    `timeout_seconds`; `barrier`, `gather`, `on_main` and `together` first wait for ranks that still work. A
    replica is one rank, or the ranks of `sequence`, which compute the same micro-batches together. Without
    `shards`, one copy of the weights is sharded over all ranks; without `experts`, each rank has them all.
    """

    accelerator: Any
    rank: int
    size: int
    device: torch.device
    peers: tuple[Peer, ...]
    control: Any = None
    timeout_seconds: int = 600
    sequence: TokenExchange | None = None
    shards: ShardGroup | None = None
    experts: ExpertGroup | None = None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Return the number of replicas."""
        return self.size if self.sequence is None else self.size // self.sequence.ranks

    @property
    def replica(self) -> int:
        """Return the index of this rank's replica."""
        return self.rank if self.sequence is None else self.rank // self.sequence.ranks

    @property
    def leads(self) -> bool:
        """Return whether this is the rank that counts and writes for its replica."""
        return self.sequence is None or self.sequence.rank == 0

    @property
    def shard_place(self) -> tuple[int, int]:
        """Return this rank's place among the ranks that shard one copy of the weights, and their number."""
        return (self.rank, self.size) if self.shards is None else (self.shards.rank, self.shards.ranks)

    @property
    def writes_shards(self) -> bool:
        """Return whether this rank's shards are written: those of the first copy are."""
        return self.rank < self.shard_place[1]

    @property
    def share_of_experts(self) -> ExpertShare | None:
        """Return which experts of each layer this rank has; None: all."""
        return None if self.experts is None else ExpertShare(self.experts.rank, self.experts.ranks)

    @property
    def host(self) -> str:
        """Return the name of this rank's host."""
        return self.peers[self.rank].host

    def barrier(self, seconds: float | None = None) -> None:
        """Wait for every rank, however long it works; raise `TimeoutError` after `seconds` if not None."""
        if self.size == 1:
            return
        options = dist.BarrierOptions()
        has_ended = threading.Event()
        options.device_ids = []
        options.timeout = _PATIENCE
        call = self.control.barrier(options)
        call.get_future().add_done_callback(lambda _: has_ended.set())
        if not has_ended.wait(seconds):  # unlike a collective call, this wait lets signals through
            raise TimeoutError(f"a rank did not reach the barrier within {seconds:.0f} s")
        call.wait()  # raises its error

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, in rank order, on all ranks."""
        self.barrier()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def differences(self, facts: Mapping[str, str]) -> dict[str, str]:
        """Return the facts that are not the same on all ranks, each with its values and their ranks."""
        digest = text_digest(json.dumps(facts, sort_keys=True))
        if len(set(self.gather(digest))) == 1:
            return {}
        by_rank = self.gather(dict(facts))
        differences = {}
        for name in dict.fromkeys(itertools.chain(*by_rank)):
            ranks: dict[str, list[int]] = {}
            for rank, facts_there in enumerate(by_rank):
                ranks.setdefault(facts_there.get(name, "-"), []).append(rank)
            if len(ranks) > 1:
                differences[name] = "; ".join(
                    f"{value} on {self._describe(those)}" for value, those in ranks.items()
                )
        return differences

    def _describe(self, ranks: Sequence[int]) -> str:
        first = f"rank {ranks[0]} ({self.peers[ranks[0]].host})"
        others = pluralize(len(ranks) - 1, "other rank")
        return first if len(ranks) == 1 else f"{first} and {others}"

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on all ranks; all raise its `DpoDistError` (law L2)."""
        outcome: list[Any] = [None, None]
        try:
            if self.is_main:
                outcome[0] = work()
        except DpoDistError as error:
            outcome[1] = error  # sent, not raised here: the other ranks wait for the broadcast
        self.barrier()  # the work may take longer than a broadcast waits
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if any raises a `DpoDistError`, all raise the lowest rank's error."""
        error: DpoDistError | None = None
        result: T | None = None
        try:
            result = work()
        except DpoDistError as raised:
            error = raised
        first = next((e for e in self.gather(error) if e is not None), None)
        if first is not None:
            raise first
        return result  # type: ignore[return-value]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over ranks in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_replicas(self, tensor: Tensor) -> Tensor:
        """Sum `tensor`, equal on all ranks of a replica, over replicas in place, and return it."""
        return self.sum(tensor if self.leads else tensor.zero_())

    def agree(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank, without using the device."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag))
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return bool(tensor.item())


def check_same_code(world: World, facts: Mapping[str, str] | None = None) -> None:
    """Check that all ranks have the same `facts` and have loaded the same code; collective.

    Compared is the source of each module of `LIBRARIES` and of the user that all ranks have loaded. Ranks
    that differ would train on without an error, or wait for each other in different calls. Call it again when
    models are loaded, whose classes libraries import as they need them.
    """
    if world.size == 1:
        return
    sources = loaded_sources(LIBRARIES)
    sources.pop("deepspeed.git_version_info_installed", None)  # it has the machine on which it was built
    # A rank may have more modules, such as those that only rank 0 needs to write.
    names = world.on_main(lambda: list(sources))
    lacking = set().union(*world.gather({name for name in names if name not in sources}))
    code = {f"source of {name}": sources[name] for name in names if name not in lacking}
    differences = world.differences({**(facts or {}), **code})
    if differences:
        values = [f"{name}: {by_rank}" for name, by_rank in differences.items()]
        raise ConfigError(
            "the processes of this run were started with different settings or software",
            where=first_few(list(differences), "other"),
            got=first_few(values, "other"),
            expected="the same on every rank",
            remedy="give every node the same command, configuration files, environment variables, checkout "
            "and packages, and start again",
        )


def check_shared(world: World, folder: Path, key: str) -> None:
    """Check that all ranks see one folder, which `key` names: a file that rank 0 writes there. Collective.

    Nothing is checked in a folder that rank 0 cannot write.
    """
    if world.size == 1:
        return

    def write() -> Path | None:
        file = temporary_name(folder / "seen")
        try:
            file.touch()
        except OSError:
            return None
        return file

    file = world.on_main(write)
    if file is None:
        return
    appears = world.gather(_appears(file))
    if world.is_main:
        file.unlink(missing_ok=True)
    if not all(appears):
        blind = world.peers[appears.index(False)]
        raise ConfigError(
            "the processes see different folders",
            where=key,
            got=f"{folder}: what {world.peers[0]} writes is not there for {blind}",
            remedy=f"put {key} on a file system that every node sees; then start again",
        )


def _appears(file: Path) -> bool:
    """Return whether a file that another process has written is seen here, soon on a network file system."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Interrupted(Exception):  # noqa: N818  (no error)
    """The work ended early because the run must stop."""


class Stops:
    """All ranks' requests to stop, on which they agree; methods are collective.

    `agreed_reasons` are those of all ranks after `reasons` gathered them.
    """

    def __init__(self, request: StopRequest, world: World):
        self.request = request
        self.world = world
        self.agreed_reasons = ""

    def must_stop(self) -> bool:
        """Return whether a rank was asked to stop at once."""
        return self.world.agree(self.request.is_urgent)

    def raise_if_stopping(self) -> None:
        """Raise `Interrupted` on all ranks if one was asked to stop at once."""
        if self.must_stop():
            raise Interrupted

    def check(self, when: str = "before the first step") -> None:
        """End the run if a rank was asked to stop at once; waits for slower ranks."""
        self.world.barrier()
        if self.must_stop():
            raise stopped_by(self.reasons(), when)

    def reasons(self) -> str:
        """Return the reasons of all ranks; tell the batch script if a person stopped the run."""
        reasons = sorted({reason for reason in self.world.gather(self.request.reason) if reason})
        self.agreed_reasons = ", ".join(reasons)
        if self.world.is_main and {BY_TRACKER, BY_STEPS} & set(reasons):
            note_progress(f"stopped by {self.agreed_reasons}")  # a batch script does not start it again
        return self.agreed_reasons


def with_sequence_groups(world: World, ranks: int) -> World:
    """Return `world` with groups of consecutive ranks that share the tokens of a micro-batch; collective.

    ZeRO shards over the whole world as without such groups: each rank has the gradient of its own tokens, and
    DeepSpeed's sum over all ranks is the gradient of all micro-batches.
    """
    if ranks == 1:
        return world
    timeout = timedelta(seconds=world.timeout_seconds)
    # Every rank creates every group, in the same order.
    groups = [
        dist.new_group(list(range(first, first + ranks)), timeout=timeout)
        for first in range(0, world.size, ranks)
    ]
    group = groups[world.rank // ranks]
    return replace(world, sequence=SequenceGroup(world.rank % ranks, ranks, group))


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share the tokens of a micro-batch; a `TokenExchange`."""

    rank: int
    ranks: int
    group: Any

    def all_to_all(self, parts: Tensor) -> Tensor:
        """See `TokenExchange`."""
        received: Tensor = _AllToAll.apply(parts, self.group)  # type: ignore[no-untyped-call]
        return received

    def all_gather(self, part: Tensor) -> Tensor:
        """See `TokenExchange`."""
        gathered = part.new_empty(self.ranks * part.numel())
        dist.all_gather_into_tensor(gathered, part.detach().flatten(), group=self.group)
        gathered = gathered.view(self.ranks, *part.shape)
        gathered[self.rank] = part  # only this entry has a gradient: every rank has the whole loss
        return gathered


class _AllToAll(torch.autograd.Function):
    """All-to-all is its own gradient. PyTorch's own function with a gradient is deprecated."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.forward(ctx, slopes.contiguous(), ctx.group), None
