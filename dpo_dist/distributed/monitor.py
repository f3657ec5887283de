"""Thread that watches the other processes of the run while the main thread works or waits."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.distributed.activity import Activity, Doing
from dpo_dist.distributed.failures import FAREWELL_SECONDS, FailureRecord
from dpo_dist.distributed.heartbeats import ANSWER_SECONDS, Heartbeats
from dpo_dist.distributed.peers import Neighbours, Peer
from dpo_dist.distributed.stack_file import StackFile
from dpo_dist.distributed.unanswered import UnansweredSignals
from dpo_dist.distributed.waits import Waits
from dpo_dist.errors import ExitCode, PeerLostError, StoppedError
from dpo_dist.progress_file import note_exit_code

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
