"""Heartbeats of all ranks, with what each of them does: who is silent, and who keeps the others waiting."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from torch._C._distributed_c10d import Store

from dpo_dist.distributed.activity import Activity, Doing
from dpo_dist.distributed.peers import Neighbours, Peer
from dpo_dist.distributed.rendezvous_store import RendezvousStore
from dpo_dist.errors import PeerLostError

_LONGEST_BEAT_SECONDS = 5.0
_BEATS_PER_TIMEOUT = 6
_RANKS_PER_SECOND = 50  # each rank reads the heartbeats of all, from one server
_SILENT_BEATS = 3
ANSWER_SECONDS = 2.0
"""Wait for the store by the thread that watches the others, which has to go on."""
_POLL_SECONDS = 2.0
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
        return 3 * self.seconds + _POLL_SECONDS if _is_cut(failure) else 0.0

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
