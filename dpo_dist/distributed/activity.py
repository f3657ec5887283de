"""The processes of a run: which have died, what each is doing, signals that a blocked one cannot answer."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from types import FrameType

import psutil

from dpo_dist.foundation.errors import ExitCode, PeerLostError
from dpo_dist.foundation.process import Arrivals


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


_PACKAGE = "dpo_dist."
_COMMUNICATION = ("torch.distributed.", "deepspeed.comm.")
_OF_DECORATORS = ("wrapper", "log_wrapper", "wrapped_fn")
_GATHER_OF_WEIGHTS = ("deepspeed.runtime.zero.partition_parameters", "wait")
_WAITS, _WORLD = f"{_PACKAGE}distributed.waits", f"{_PACKAGE}distributed.world"


@dataclass(frozen=True)
class Doing:
    """Activity of a rank at one moment.

    Attributes:
        work: kind of work, and its step.
        place: innermost line of this package: file, line, function.
        call: the collective call that it waits in; empty: none.
        seconds: since it has been at this place.
        is_patient: whether the call lasts as long as the ranks that it waits for send heartbeats.
    """

    work: str = "starting"
    place: str = ""
    call: str = ""
    seconds: float = 0.0
    is_patient: bool = False

    @property
    def is_blocked(self) -> bool:
        """Return whether it waits in a call that times out, and answers no signal meanwhile."""
        return bool(self.call) and not self.is_patient

    def __str__(self) -> str:
        parts = [self.work]
        if self.call:
            parts.append(f"waiting in {self.call}")
        if self.place:
            parts.append(f"at {self.place}")
        return f"{', '.join(parts)}, for {self.seconds:.0f} s"

    def as_json(self) -> str:
        """Return all fields as JSON, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Doing":
        """Return the activity that another rank has written."""
        return cls(**json.loads(text))


class Activity:
    """Activity of the thread that creates this object; another thread samples it.

    Attributes:
        work: kind of work, as in `training.work_clock`.
        steps_done: returns the number of steps done; None before training.
        is_shown: whether a line on the screen says that this process works.
    """

    def __init__(self) -> None:
        self.work = "starting"
        self.steps_done: Callable[[], int] | None = None
        self.is_shown = False
        self.last = Doing()
        self._thread = threading.get_ident()
        self._mark: tuple[object, ...] = ()
        self._since = time.monotonic()

    def enter(self, work: str) -> None:
        """Begin a kind of work."""
        self.work = work

    def sample(self) -> Doing:
        """Return the present activity; a thread is at the same place until its stack of calls changes."""
        frames = list(_frames(sys._current_frames().get(self._thread)))
        work = self._named_work()
        mark = work, *((id(frame), frame.f_lasti) for frame in frames)
        now = time.monotonic()
        if mark != self._mark:
            self._mark, self._since = mark, now
        is_patient = any(_module(frame) == _WAITS for frame in frames)
        call = _patient_call(frames) if is_patient else _call(frames)
        self.last = Doing(work, _place(frames), call, round(now - self._since, 1), is_patient)
        return self.last

    def _named_work(self) -> str:
        if self.steps_done is None:
            return self.work
        done = self.steps_done()
        return f"step {done + 1}" if self.work == "training" else f"{self.work} after step {done}"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of a stack, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _place(frames: list[FrameType]) -> str:
    """Return the innermost line of this package that is not itself a collective call of `World`."""
    own = [f for f in frames if _module(f).startswith(_PACKAGE) and _module(f) not in (_WAITS, _WORLD)]
    if not own:
        return ""
    code = own[0].f_code
    path = PurePath(code.co_filename)
    return f"{path.parent.name}/{path.name}:{own[0].f_lineno} ({code.co_name})"


def _call(frames: list[FrameType]) -> str:
    """Return the name of the collective call that a stack is in; empty if it is in none."""
    name, is_innermost = "", True
    for frame in frames:
        module, function = _module(frame), frame.f_code.co_name
        if module.startswith(_PACKAGE):
            break
        if function in _OF_DECORATORS:
            continue
        if module.startswith(_COMMUNICATION):
            name = function
        elif is_innermost and (module, function) == _GATHER_OF_WEIGHTS:
            name = "all_gather of weights"
        is_innermost = False
    return name


def _patient_call(frames: list[FrameType]) -> str:
    """Return the name of the method of `World` that waits for ranks that still work."""
    names = [frame.f_code.co_name for frame in frames if _module(frame) == _WORLD]
    return names[-1] if names else "wait"


_REQUESTS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGALRM,
)
_ECHO_SECONDS = 2.0
_SAMPLING_SECONDS = 1.2
_WHILE_SILENT_SECONDS = 20.0
_WHILE_WAITING_SECONDS = 120.0


class UnansweredSignals:
    """Signals since the creation of this object, until `close`; nothing is read outside of the main thread.

    Args:
        timeout_seconds: timeout of a collective call; a signal is answered earlier.
    """

    def __init__(self, timeout_seconds: float):
        self.name = ""
        self._first = self._second = 0.0
        self._second_number = 0
        self._while_silent = min(_WHILE_SILENT_SECONDS, timeout_seconds / 2)
        self._while_waiting = min(_WHILE_WAITING_SECONDS, timeout_seconds / 2)
        is_main = threading.current_thread() is threading.main_thread()
        self._arrivals = Arrivals() if is_main else None

    def close(self) -> None:
        """Stop reading signals."""
        if self._arrivals is not None:
            self._arrivals.close()

    def exit_code(self, doing: Doing, *, is_peer_silent: bool) -> int | None:
        """Return the exit code with which to end this process now; None: go on.

        Nothing can be saved while a rank is silent, and a second signal ends a process at once. A main thread
        at another place than before a signal has answered it.

        Args:
            doing: present activity of the main thread.
            is_peer_silent: whether another rank sends no heartbeat.
        """
        self._read()
        if not self._first:
            return None
        now = time.monotonic()
        arrived = now - doing.seconds - _SAMPLING_SECONDS
        if self._second and arrived <= self._second and now - self._second > _SAMPLING_SECONDS:
            return 128 + self._second_number
        waited = now - self._first
        is_in_vain = is_peer_silent and min(waited, doing.seconds) > self._while_silent
        is_blocked = doing.is_blocked and arrived <= self._first and waited > self._while_waiting
        return ExitCode.preempted if is_in_vain or is_blocked else None

    def _read(self) -> None:
        heard = [] if self._arrivals is None else self._arrivals.heard
        for number, at in heard:
            if number in _REQUESTS and not self._first:
                self._first, self.name = at, signal.Signals(number).name
            elif number in _REQUESTS[:-1] and at > self._first + _ECHO_SECONDS and not self._second:
                self._second, self._second_number = at, number
