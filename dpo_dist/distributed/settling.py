"""The check at start on all ranks: arrange the model of an engine so that its log-probs are exact."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.world import World
from dpo_dist.model.exactness import check_training, settle
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.objective.token_logps import Statistic


class Engine(Protocol):
    """A model that scores micro-batches."""

    @property
    def model(self) -> PackedCausalLM:
        """Return the model."""
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
        trains: whether the model is trained; then its log-probs in training mode are checked, too.

    Raises:
        ConfigError: no arrangement is exact, on any rank; log-probs are others in training mode.
    """
    was_training = engine.model.training
    engine.model.eval()
    settle(engine.model, engine.token_logps, world.device, max_length, world.agree, key)
    if trains:
        check_training(engine.model, engine.token_logps, world.device, max_length, world.agree, key)
    engine.model.train(was_training)
