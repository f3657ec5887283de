"""A loss of the user's own: `loss=custom loss.function=tests.support.own_loss:hinge`."""

from torch import Tensor
from torch.nn.functional import relu

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.objective.logps import PairLogps

OWN = "tests.support.own_loss:hinge"


def hinge(policy: PairLogps, reference: PairLogps, config: LossConfig) -> Tensor:
    return relu(1 - config.beta * (policy.margin - reference.margin))


def function_of(kind: LossKind) -> str | None:
    """The `loss.function` that a kind needs."""
    return OWN if kind is LossKind.custom else None
