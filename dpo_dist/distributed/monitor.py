"""Watch the processes of a run: heartbeats, who is silent, who keeps the others waiting."""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from dpo_dist.distributed.activity import Activity, Doing, Neighbours, Peer, UnansweredSignals
from dpo_dist.distributed.failures import FAREWELL_SECONDS, NOBODY, FailureRecord, RendezvousStore, StackFile
from dpo_dist.foundation.errors import DpoDistError, ExitCode, PeerLostError, StoppedError
from dpo_dist.foundation.process import note_exit_code

_UNLIMITED = timedelta(days=365)


class Waits:
    """Waits of the main thread for the other ranks; the thread that reads their heartbeats may end one.

    A collective call times out, and answers signals when it returns. These waits do neither.
    """

    def __init__(self) -> None:
        self._answer = SimpleQueue[bool]()

    def wait(self, group: Any, seconds: float | None = None) -> None:
        """Wait until every rank of `group` is here; collective.

        A barrier, in which every rank waits for every other one, so that all notice a dead one.

        If a signal raises an error meanwhile, the call is still under way: no other call may follow, and the
        error must leave `World.watch`, and so must a `TimeoutError`.

        Args:
            group: of ranks.
            seconds: limit; None: none.

        Raises:
            RuntimeError: a rank has ended, or was silent for the whole timeout.
            TimeoutError: a rank has not come within `seconds`.
        """
        options = dist.BarrierOptions()
        options.device_ids, options.timeout = [], _UNLIMITED
        answer = self._answer = SimpleQueue[bool]()
        call = group.barrier(options)
        call.get_future().add_done_callback(lambda _: answer.put(True))
        try:
            has_arrived = answer.get(timeout=seconds)
        except Empty:
            raise TimeoutError(f"a rank has not come within {seconds:.0f} s") from None
        if not has_arrived:
            raise RuntimeError("timed out, because a rank is silent or has ended")
        call.wait()  # raises its error

    def give_up(self) -> None:
        """End the present wait with an error; from any thread."""
        self._answer.put(False)


_LONGEST_BEAT_SECONDS = 5.0
_BEATS_PER_TIMEOUT = 6
_RANKS_PER_SECOND = 50  # each rank reads the heartbeats of all, from one server
_SILENT_BEATS = 3
ANSWER_SECONDS = 2.0
"""Wait for the store by the thread that watches the others, which has to go on."""
_BEAT_POLL_SECONDS = 2.0
_SHOWN_RANKS = 8
_TIMEOUT, _CUT = r"timed ?out|timeout", r"closed by peer|reset by peer|broken pipe|remote process exited"


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a rank.

    Attributes:
        count: of heartbeats.
        doing: activity of the rank.
        arrived: time of this process's clock.
    """

    count: int
    doing: Doing
    arrived: float

    @property
    def age(self) -> float:
        """Return the seconds since it arrived."""
        return time.monotonic() - self.arrived


class Heartbeats:
    """Sends this rank's heartbeat and reads those of the others, through the store of the rendezvous.

    Args:
        peers: all ranks.
        neighbours: those of this host.
        store: of the rendezvous.
        activity: of this process.
        timeout_seconds: timeout of a collective call.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        neighbours: Neighbours,
        store: RendezvousStore,
        activity: Activity,
        timeout_seconds: float,
    ):
        self.seconds = min(
            max(_LONGEST_BEAT_SECONDS, len(peers) / _RANKS_PER_SECOND), timeout_seconds / _BEATS_PER_TIMEOUT
        )
        self._peers, self._neighbours, self._store = peers, neighbours, store
        self._activity, self._timeout_seconds = activity, timeout_seconds
        self._keys = [f"heartbeat/{peer.rank}" for peer in peers]
        self._have_all_begun = False
        self._count, self._due = 0, 0.0
        self._last: dict[int, Heartbeat] = {}

    def beat_if_due(self) -> bool:
        """Send a heartbeat and read all, if it is time; return whether it was.

        Takes `ANSWER_SECONDS` if the store hangs.
        """
        late = time.monotonic() - self._due
        if late < 0:
            return False
        if self._due and late > _SILENT_BEATS * self.seconds:
            self._forgive(late)
        self.beat()
        self._due = time.monotonic() + self.seconds
        return True

    def _forgive(self, seconds: float) -> None:
        """Count time in which this process was stopped, as its whole job may have been, as no silence."""
        for rank, beat in self._last.items():
            self._last[rank] = replace(beat, arrived=beat.arrived + seconds)

    def beat(self) -> None:
        """Send a heartbeat and read all that have begun."""
        self._count += 1
        own = f"{self._count} {self._activity.last.as_json()}"

        def exchange(store: Store) -> list[bytes]:
            store.set(self._keys[self._neighbours.rank], own)
            # To read a key that nobody has written blocks.
            self._have_all_begun = self._have_all_begun or store.check(self._keys)
            return list(store.multi_get(self._keys)) if self._have_all_begun else []

        for peer, text in zip(self._peers, self._store.ask(exchange, ANSWER_SECONDS) or (), strict=False):
            count, _, doing = text.decode().partition(" ")
            known = self._last.get(peer.rank)
            if known is None or known.count != int(count):
                self._last[peer.rank] = Heartbeat(int(count), Doing.from_json(doing), time.monotonic())

    def silent(self, seconds: float | None = None) -> list[Peer]:
        """Return the ranks without a heartbeat for so long; none if no heartbeat can be read."""
        limit = _SILENT_BEATS * self.seconds if seconds is None else seconds
        if self._store.silent_seconds:
            return []
        others = [peer for peer in self._peers if peer.rank != self._neighbours.rank]
        return [peer for peer in others if peer.rank in self._last and self._last[peer.rank].age >= limit]

    def is_anybody_silent(self, seconds: float) -> bool:
        """Return whether a rank has sent no heartbeat for so long, or none could be read."""
        return bool(self.silent(seconds)) or self._store.silent_seconds >= seconds

    @property
    def is_cut_off(self) -> bool:
        """Return whether no heartbeat can be read: the host of the store is silent."""
        return self._store.silent_seconds > _SILENT_BEATS * self.seconds

    def late(self, waited_seconds: float) -> list[Peer]:
        """Return the ranks that compute, or are silent, while another one has waited for so long."""
        last = self._last
        if not any(beat.doing.call and beat.doing.seconds >= waited_seconds for beat in last.values()):
            return self.silent(waited_seconds)
        silent = self.silent()
        return [p for p in self._peers if p in silent or (p.rank in last and not last[p.rank].doing.call)]

    def describe(self, peers: Sequence[Peer]) -> str:
        """Return what is known of ranks, as one text."""
        silent = self.silent()
        texts = [self._describe(peer, is_silent=peer in silent) for peer in peers[:_SHOWN_RANKS]]
        more = len(peers) - len(texts)
        return "; ".join([*texts, *([f"and {more} more ranks"] if more > 0 else [])])

    def _describe(self, peer: Peer, *, is_silent: bool) -> str:
        beat = self._last.get(peer.rank)
        if beat is None:
            return f"{peer}: no heartbeat yet"
        if not is_silent:
            return f"{peer}: {beat.doing}; its heartbeat arrives"
        since = (datetime.now().astimezone() - timedelta(seconds=beat.age)).strftime("%H:%M:%S")
        stopped = " (it is stopped, by a signal or a debugger)" if self._neighbours.is_stopped(peer) else ""
        return f"{peer}: no heartbeat since {since}{stopped}; before: {beat.doing}"

    def waiting_error(self, got: str, stacks: Path | None) -> PeerLostError:
        """Return the error of a process that has waited too long; it names the ranks that are to blame.

        Args:
            got: the failure that ended the wait, if there was one.
            stacks: file with the stacks of this process.
        """
        silent = self.silent(2 * self.seconds)
        named = silent or self.late(self._timeout_seconds / 2)
        if self._store.silent_seconds > self.seconds:
            message = f"the host {self._store.address}, or the network to it, does not answer"
            details = f"no answer of its rendezvous store for {self._store.silent_seconds:.0f} s"
        elif named:
            ranks = ", ".join(str(peer.rank) for peer in named[:_SHOWN_RANKS])
            verb = "does not answer" if silent else "keeps the others waiting"
            message, details = f"rank {ranks} of {len(self._peers)} {verb}", self.describe(named)
        else:
            message, details = "a process of the run does not answer", self.describe(self._odd_ones())
        written = "" if stacks is None else f"stacks of all threads are in {stacks.parent}/rank-N.stacks.txt"
        cannot = ", except of processes that are stopped" if written and silent else ""
        return PeerLostError(
            message,
            where=f"rank {self._neighbours.rank}: {self._activity.last}",
            got="; ".join(part for part in (details, got[:300]) if part),
            expected=f"an answer within parallelism.timeout_seconds ({self._timeout_seconds:.0f})",
            remedy="; ".join(
                filter(
                    None,
                    [
                        written + cannot,
                        "end a process that hangs (its node, network or file system may hang)",
                        "run the same command again to resume from the last checkpoint",
                    ],
                )
            ),
        )

    def _odd_ones(self) -> list[Peer]:
        """Return the ranks by how few others are at the same place; a call that one rank skips shows."""
        places = {rank: (beat.doing.work, beat.doing.place) for rank, beat in self._last.items()}
        at = list(places.values())
        known = [peer for peer in self._peers if peer.rank in places]
        return sorted(known, key=lambda peer: at.count(places[peer.rank]))

    def patience(self, failure: BaseException) -> float:
        """Return the seconds after the failure of a call in which the rank that caused it becomes silent.

        The last heartbeat of a process on another host may arrive a whole beat after its end.
        """
        return 3 * self.seconds + _BEAT_POLL_SECONDS if _is_cut(failure) else 0.0

    def error_of(self, failure: BaseException, stacks: Path | None) -> PeerLostError | None:
        """Return a collective call's failure as an error for the user; None if no rank caused it.

        A connection may also be cut by the end of a process on another host, which then becomes silent.
        """
        message = _message(failure)
        if not isinstance(failure, RuntimeError):
            return None
        has_waited = bool(re.search(_TIMEOUT, message, re.IGNORECASE))
        if has_waited or (_is_cut(failure) and (self.silent(2 * self.seconds) or self._store.silent_seconds)):
            return self.waiting_error(message, stacks)
        return None


def is_of_communication(text: str) -> bool:
    """Return whether the text of an error says that a call waited too long for a rank, or was cut off."""
    return bool(re.search(f"{_TIMEOUT}|{_CUT}", text, re.IGNORECASE))


def _is_cut(failure: BaseException) -> bool:
    return bool(re.search(_CUT, _message(failure), re.IGNORECASE))


def _message(failure: BaseException) -> str:
    return (str(failure).splitlines() or [""])[0]


_POLL_SECONDS = 1.0
_GRACE_SECONDS = 8.0
_SLOW_SECONDS = 60.0
_MARGIN_SECONDS = 10.0
_QUESTIONS = 3  # to the store, in one round


@dataclass(frozen=True)
class Reports:
    """Outputs for reports about the other processes, from any thread.

    Attributes:
        show: prints an error, on any rank.
        say: prints a line, on rank 0.
        stacks: file for the stacks of this process; None: none.
    """

    show: Callable[[str], None] = print
    say: Callable[[str], None] = print
    stacks: Path | None = None


class Monitor(threading.Thread):
    """Thread that sends heartbeats, names ranks that are slow, and ends a process that waits in vain.

    Args:
        neighbours: the processes of this host.
        record: of failures.
        heartbeats: of all ranks.
        activity: of the main thread.
        timeout_seconds: timeout of a collective call.
        reports: outputs.
        stacks: of this process.
        signals: that this process receives.
        waits: of the main thread for ranks that still work.
        is_aborted: whether the main thread gets no error when a collective call times out: NCCL aborts.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        record: FailureRecord,
        heartbeats: Heartbeats,
        activity: Activity,
        timeout_seconds: float,
        reports: Reports,
        stacks: StackFile,
        signals: UnansweredSignals,
        waits: Waits,
        *,
        is_aborted: bool,
    ):
        super().__init__(name="peers", daemon=True)
        self._neighbours, self._record, self._heartbeats = neighbours, record, heartbeats
        self._activity, self._timeout_seconds, self._reports = activity, timeout_seconds, reports
        self._stacks, self._signals, self._waits = stacks, signals, waits
        self._margin = min(_MARGIN_SECONDS, timeout_seconds / 2)
        self._patience = timeout_seconds - self._margin if is_aborted else timeout_seconds
        self._grace = 0.0 if is_aborted else _GRACE_SECONDS
        self._first_slow = self._slow = min(_SLOW_SECONDS, timeout_seconds / 2)
        self._stopping = threading.Event()
        self._ending = threading.Lock()

    def run(self) -> None:
        """Watch until `stop`; a grace period lets the main thread detect failures by itself."""
        while not self._stopping.wait(min(_POLL_SECONDS, self._heartbeats.seconds)):
            doing = self._activity.sample()
            if self._heartbeats.beat_if_due():
                self._name_slow_ranks()
                self._write_stacks(doing)
            self._answer_signals(doing)
            lost = self._neighbours.lost()
            is_overdue = self._is_overdue(doing)
            if self._record.exit_code(ANSWER_SECONDS) is None and not lost and not is_overdue:
                continue
            if is_overdue:
                self._stacks.write("the run ends")
            self._waits.give_up()
            if self._stopping.wait(self._grace if is_overdue else _GRACE_SECONDS):
                return
            with self._ending:
                if not self._stopping.is_set():
                    self._end(lost)

    def stop(self) -> None:
        """Stop watching; after this call the thread does not end the process."""
        with self._ending:
            self._stopping.set()

    def close(self) -> None:
        """Stop watching and wait for the end of the thread.

        At the end of the interpreter, a thread within a question to the store would abort the process.
        """
        self.stop()
        if self.is_alive():
            self.join(_QUESTIONS * ANSWER_SECONDS)

    def _write_stacks(self, doing: Doing) -> None:
        """Write the stacks on all ranks shortly before a wait ends in an error, which unwinds them."""
        is_nearly_over = doing.seconds >= self._timeout_seconds - self._margin
        if is_nearly_over and (doing.is_blocked or self._heartbeats.silent()):
            self._stacks.write(str(doing).rpartition(",")[0])
            self._record.ask_for_stacks()
        elif self._record.wants_stacks(ANSWER_SECONDS):
            self._stacks.write("another rank has waited for almost the whole timeout")

    def _answer_signals(self, doing: Doing) -> None:
        """End the process at a signal that the main thread cannot answer, if waiting would save nothing."""
        silent = self._heartbeats.silent()
        code = self._signals.exit_code(doing, is_peer_silent=bool(silent or self._heartbeats.is_cut_off))
        if code is None:
            return
        with self._ending:
            if self._stopping.is_set():
                return
            is_first = self._record.report(code)
            if is_first is not False and code == ExitCode.preempted:
                error = StoppedError(
                    f"by {self._signals.name} while this process waited for another one, without saving",
                    where=f"rank {self._neighbours.rank}: {doing}",
                    got=self._heartbeats.describe(silent),
                    remedy="run the same command again to resume from the last checkpoint",
                )
                self._reports.show(error.block())
            note_exit_code(code)
            os._exit(code)

    def _is_overdue(self, doing: Doing) -> bool:
        """Return whether a rank has been silent for the whole timeout, and the main thread did not go on."""
        return doing.seconds >= self._patience and self._heartbeats.is_anybody_silent(self._patience)

    def _name_slow_ranks(self) -> None:
        """Print who keeps the others waiting, on rank 0, at growing intervals."""
        if self._neighbours.rank > 0:
            return
        late = self._heartbeats.late(self._slow)
        if self._activity.is_shown:  # there is a line on the screen about the work of this rank
            late = [peer for peer in late if peer.rank != self._neighbours.rank]
        if late:
            self._reports.say(f"waiting for {self._heartbeats.describe(late)}")
            self._slow *= 2
        elif self._slow > self._first_slow and not self._heartbeats.late(self._first_slow):
            self._reports.say("no rank waits for another one any more")
            self._slow = self._first_slow

    def _end(self, lost: Sequence[Peer]) -> None:
        """End the process; if a process died or is silent without a record, one survivor prints the error."""
        exit_code = self._record.exit_code()
        if exit_code is not None:
            os._exit(exit_code)
        if lost:
            error = self._neighbours.lost_error(lost, "this process waits for it in a collective call")
        else:
            error = self._heartbeats.waiting_error("", self._stacks.path)
            error.reporting_rank = self._neighbours.rank
        self._print(error)
        # The other survivors would count this process as dead if it exited now.
        time.sleep(FAREWELL_SECONDS)
        os._exit(error.exit_code)

    def _print(self, error: PeerLostError) -> None:
        if error.reporting_rank == self._neighbours.rank:
            self._record.ask_for_stacks()
            if self._record.report(error.exit_code) is not False:
                self._reports.show(error.block())


class Watched:
    """The parts that watch the processes of a run; the first process to detect a failure prints it.

    Args:
        peers: all ranks.
        rank: of this process.
        activity: of the main thread.
        timeout_seconds: timeout of a collective call.
        reports: outputs.
        device_type: of the devices, as PyTorch names it.
        waits: of the main thread.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        rank: int,
        activity: Activity,
        timeout_seconds: float,
        reports: Reports,
        device_type: str,
        waits: Waits,
    ):
        self.neighbours = Neighbours(peers, rank)  # first: one may die while this one connects
        store = RendezvousStore(len(peers))
        self.record = FailureRecord(len(peers), store)
        self.stacks = StackFile(reports.stacks)
        self.heartbeats = Heartbeats(peers, self.neighbours, store, activity, timeout_seconds)
        self.signals = UnansweredSignals(timeout_seconds)
        self.monitor = Monitor(
            self.neighbours,
            self.record,
            self.heartbeats,
            activity,
            timeout_seconds,
            reports,
            self.stacks,
            self.signals,
            waits,
            is_aborted=device_type == "cuda",
        )

    def waited_in_vain(self, failure: BaseException) -> DpoDistError | None:
        """Return the error of a collective call that timed out or was cut off; None for another failure.

        If the store cannot be reached, one process of each host prints it: its lowest rank above 0, as rank
        0's host has the store and may be the one that hangs.
        """
        error = self.heartbeats.error_of(failure, self.stacks.path)
        if error is None:
            return None
        rank, is_first = self.neighbours.rank, self.record.report(error.exit_code)
        reports = rank == self.neighbours.lowest_rank_but_0 if is_first is None else is_first
        error.reporting_rank = rank if reports else NOBODY
        self.record.wait_for_all(FAREWELL_SECONDS)
        return error
