"""The parts that watch the processes of a run, put together."""

from collections.abc import Sequence

from dpo_dist.distributed.activity import Activity
from dpo_dist.distributed.failures import FAREWELL_SECONDS, NOBODY, FailureRecord
from dpo_dist.distributed.heartbeats import Heartbeats
from dpo_dist.distributed.monitor import Monitor, Reports
from dpo_dist.distributed.peers import Neighbours, Peer
from dpo_dist.distributed.rendezvous_store import RendezvousStore
from dpo_dist.distributed.stack_file import StackFile
from dpo_dist.distributed.unanswered import UnansweredSignals
from dpo_dist.distributed.waits import Waits
from dpo_dist.errors import DpoDistError


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
