"""Metrics of the user's own: `metrics.function=tests.support.own_metrics:of_pairs`."""

from torch import Tensor

from dpo_dist.config.losses import LossConfig
from dpo_dist.objective.logps import PairLogps

OWN = "tests.support.own_metrics:of_pairs"


def of_pairs(policy: PairLogps, reference: PairLogps, config: LossConfig) -> dict[str, Tensor]:
    margin = config.beta * (policy.margin - reference.margin)
    return {"margin": margin, "likelier": policy.mean_chosen > policy.mean_rejected}


def of_all(policy: PairLogps, *_: object) -> dict[str, Tensor]:
    return {"rank": policy.margin.argsort()}


def mean(policy: PairLogps, *_: object) -> dict[str, Tensor]:
    return {"margin": policy.margin.mean()}


def unnamed(policy: PairLogps, *_: object) -> Tensor:
    return policy.margin


def badly_named(policy: PairLogps, *_: object) -> dict[str, Tensor]:
    return {"margin/math": policy.margin}


def infinite(policy: PairLogps, *_: object) -> dict[str, Tensor]:
    return {"margin": policy.margin / 0}


def none(*_: object) -> dict[str, Tensor]:
    return {}


def by_hand(policy: PairLogps, *_: object) -> dict[str, Tensor]:
    return {"likelihood": policy.chosen / policy.chosen_tokens}
