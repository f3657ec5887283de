"""The check at start on all ranks: arrange the model of an engine so that its log-probs are exact."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.heartbeats import is_of_communication
from dpo_dist.distributed.world import World
from dpo_dist.errors import ConfigError
from dpo_dist.model.checked import CheckedModel
from dpo_dist.model.exactness import check_training, check_use, settle
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.objective.token_logps import Statistic


class Engine(Protocol):
    """A model that scores micro-batches."""

    @property
    def model(self) -> PackedCausalLM:
        """Return the model."""
        ...

    @property
    def is_synchronised(self) -> bool:
        """Whether each forward is collective."""
        ...

    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        """Return log-probs of every target, float32 [targets]."""
        ...


def settle_engine(
    engine: Engine, max_length: int, world: World, key: str = "model.path", *, trains: bool = False
) -> None:
    """Arrange the model of `engine` by `model.exactness.settle`; its mode does not change. Collective.

    Args:
        engine: of the model.
        max_length: the longest prompt plus response, in tokens.
        world: of the ranks.
        key: the configuration key to name in an error.
        trains: whether the model is trained; then its log-probs in training mode and, of several
            ranks, the weights that sequences use are checked, too.

    Raises:
        ConfigError: no arrangement is exact, on any rank; log-probs are others in training mode, or
            sequences use other weights.
        RuntimeError: a forward waited too long for another rank, or that rank has ended.
    """
    are_forwards_collective = engine.is_synchronised or world.sequence is not None

    def agree(fault: str, seconds: float | None = None) -> str:
        if are_forwards_collective and is_of_communication(fault):
            raise RuntimeError(fault)  # no fault of the model: the world names the rank
        try:
            return world.first_fault(fault, seconds if are_forwards_collective else None)
        except TimeoutError:
            raise ConfigError(
                "the model's forward fails on one rank, and the others wait for it",
                where=key,
                got=f"{world.peers[world.rank]}: {fault}",
                expected="the same on all ranks",
                remedy="see the traceback in this rank's log; compare devices, drivers and packages of the "
                "hosts, and remove what depends on the rank from the model's own code",
            ) from None

    world.barrier()  # a rank that begins late would be one that does not fail
    was_training = engine.model.training
    engine.model.eval()
    checked = CheckedModel(engine.model, engine.token_logps, world.device, max_length, key, agree)
    settle(checked)
    if trains:
        check_training(checked)
        if world.size > 1:
            check_use(checked)
    engine.model.train(was_training)
