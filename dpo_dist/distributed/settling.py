"""The check at start on all ranks: arrange the model of an engine so that its log-probs are exact."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.world import World
from dpo_dist.model.exactness import settle
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


def settle_engine(engine: Engine, max_length: int, world: World, key: str = "model.path") -> None:
    """Arrange the model of `engine` by `model.exactness.settle`; its mode does not change. Collective.

    Raises:
        ConfigError: no arrangement is exact, on any rank.
    """
    was_training = engine.model.training
    engine.model.eval()
    settle(engine.model, engine.token_logps, world.device, max_length, world.agree, key)
    engine.model.train(was_training)
