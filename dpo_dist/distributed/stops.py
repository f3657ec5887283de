"""The agreement of all ranks to stop early."""

from dpo_dist.distributed.world import World
from dpo_dist.progress_file import note_stop
from dpo_dist.signals import BY_STEPS, BY_TRACKER, StopRequest, stopped_by


class GivenWay(Exception):  # noqa: N818  (no error)
    """Work was ended because the run must stop."""


class Stops:
    """Every rank's request to stop, on which all ranks agree; methods are collective.

    Args:
        request: of this rank.
        world: of the run.

    Attributes:
        agreed: the reasons of all ranks, once they were gathered.
    """

    def __init__(self, request: StopRequest, world: World):
        self.request, self.world = request, world
        self.agreed = ""

    def must_stop(self) -> bool:
        """Return whether a rank was asked to stop at once."""
        return self.world.agree(self.request.is_urgent)

    def give_way(self) -> None:
        """End the work if a rank was asked to stop at once.

        Raises:
            GivenWay: on all ranks.
        """
        if self.must_stop():
            raise GivenWay

    def check(self, when: str = "before the first step") -> None:
        """End the run if a rank was asked to stop at once; waits for ranks that are slower.

        Raises:
            StoppedError: on all ranks.
        """
        self.world.barrier()
        if self.must_stop():
            raise stopped_by(self.reasons(), when)

    def reasons(self) -> str:
        """Return the reasons of all ranks; those of a person are noted for a batch script."""
        reasons = sorted({reason for reason in self.world.gather(self.request.reason) if reason})
        self.agreed = ", ".join(reasons)
        if self.world.is_main and {BY_TRACKER, BY_STEPS} & set(reasons):
            note_stop(self.agreed)
        return self.agreed
