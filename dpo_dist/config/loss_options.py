"""The options of each kind of loss: `loss.options`."""

from enum import StrEnum

from dpo_dist.config.fields import key, schema

BcoDelta = StrEnum("BcoDelta", ["zero", "running_mean"])
"""Reward shift of `bco_pair`."""


@schema
class IpoOptions:
    """Options of `ipo`."""

    length_average: bool = key(True)
    """`ipo`: divide log-ratios by the response's tokens."""


@schema
class BcoPairOptions:
    """Options of `bco_pair`."""

    delta: BcoDelta = key(BcoDelta.zero)
    """`bco_pair`: reward shift."""


@schema
class DiscopopOptions:
    """Options of `discopop`."""

    # Above 1 the loss of a pair that is ranked wrongly grows like exp(-b h).
    tau: float = key(0.05, gt=0, le=1)
    """`discopop`: temperature of the blend of its two losses."""


@schema
class DpopOptions:
    """Options of `dpop`."""

    penalty_weight: float = key(50.0, ge=0)
    """`dpop`: weight of the penalty for a chosen response that is less likely than under the reference."""


@schema
class OdpoOptions:
    """Options of `odpo`."""

    alpha: float = key(1.0, ge=0)
    """`odpo`: weight of the score gap's logarithm."""


@schema
class RewardAwareOptions:
    """Options of `reward_aware`."""

    scale: float = key(1.0, gt=0)
    """`reward_aware`: factor of the score gap; the sigmoid of the product is the target probability."""


@schema
class SimpoOptions:
    """Options of `simpo`."""

    gamma: float = key(0.5, ge=0)
    """`simpo`: target margin."""


@schema
class OrpoOptions:
    """Options of `orpo`."""

    odds_weight: float = key(0.1, ge=0)
    """`orpo`: weight of the odds-ratio term, lambda of the paper."""


@schema
class CpoOptions:
    """Options of `cpo`."""

    nll_weight: float = key(1.0, ge=0)
    """`cpo`: weight of the chosen response's mean negative log-prob."""


@schema
class BetaDpoOptions:
    """Options of `beta_dpo`."""

    alpha: float = key(0.6, ge=0)
    """`beta_dpo`: how much beta follows the batch's margin."""
    momentum: float = key(0.9, ge=0, lt=1)
    """`beta_dpo`: momentum of the moving average of margins."""
