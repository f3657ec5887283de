"""What must hold between the options of a loss: none without effect, none outside of its range (law L5)."""

import math
from collections.abc import Iterable

from dpo_dist.config.loss_kinds import KINDS, Divergence, LossConfig, LossKind, kinds_using
from dpo_dist.config.ranges import check_range
from dpo_dist.errors import ConfigError

_OPTIONS = frozenset().union(*(facts.options for facts in KINDS.values()))
_KINDS_USING = {option: frozenset(kinds_using(option)) for option in sorted(_OPTIONS)}
_ONE_SIDED = frozenset(kind for kind, facts in KINDS.items() if facts.fewest_responses == 1)

# Where one kind of the sum uses an option, the others would be wrong with it.
_ALL_KINDS_MUST_USE = ("divergence", "weighting")


def check_loss(loss: LossConfig) -> None:
    """Accept `loss` or say what does not fit together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_terms(loss)
    _check_used(loss)
    _check_ranges(loss)
    _check_smoothing(loss)


def _check_ranges(loss: LossConfig) -> None:
    check_range("loss.beta", loss.beta, above=0)
    for option in (
        "simpo_gamma",
        "dpop_lambda",
        "offset_alpha",
        "orpo_lambda",
        "cpo_nll_weight",
        "beta_alpha",
    ):
        check_range(f"loss.{option}", getattr(loss, option), at_least=0)
    check_range("loss.alpha_coefficient", loss.alpha_coefficient, at_least=-10, at_most=10)
    # Above 1 the loss of a pair that is ranked wrongly grows like exp(-b h).
    check_range("loss.discopop_tau", loss.discopop_tau, above=0, at_most=1)
    check_range("loss.beta_momentum", loss.beta_momentum, at_least=0, below=1)
    check_range("loss.ld_alpha", loss.ld_alpha, at_least=0, at_most=1)


def _check_smoothing(loss: LossConfig) -> None:
    # A share of labels that are wrong. From a half on, the loss would prefer the rejected response.
    if LossKind.exo_pair in loss.kinds:
        check_range("loss.label_smoothing", loss.label_smoothing, above=0, below=0.5)
    check_range("loss.label_smoothing", loss.label_smoothing, at_least=0, below=0.5)


def _check_terms(loss: LossConfig) -> None:
    if not loss.terms:
        return
    for index, term in enumerate(loss.terms):
        if term.weight == 0 or not math.isfinite(term.weight):
            raise ConfigError(
                "a term without a usable weight",
                where=f"loss.terms[{index}].weight",
                got=str(term.weight),
                expected="a finite number other than 0",
                remedy="leave the term out or give it a weight",
            )
        if term.kind in loss.kinds[:index]:
            raise ConfigError(
                "a kind of loss appears twice",
                where=f"loss.terms[{index}].kind",
                got=term.kind,
                remedy="make it one term with the sum of the weights",
            )
    if loss.kind is not LossConfig.kind and loss.kind not in loss.kinds:
        raise ConfigError(
            "loss.terms is the whole loss, so loss.kind has no effect",
            where="loss.kind, loss.terms",
            got=f"{loss.kind}, {', '.join(loss.kinds)}",
            remedy=f"add {{kind: {loss.kind}}} to loss.terms or leave loss.kind out",
        )


def _check_used(loss: LossConfig) -> None:
    for option, users in _KINDS_USING.items():
        value = getattr(loss, option)
        if value != getattr(LossConfig, option) and users.isdisjoint(loss.kinds):
            raise _without_effect(option, f"{value} with {', '.join(loss.kinds)}", users)
    for option in _ALL_KINDS_MUST_USE:
        # sft beside a preference loss is not what such an option is about.
        others = sorted(set(loss.kinds) - _KINDS_USING[option] - _ONE_SIDED)
        if getattr(loss, option) != getattr(LossConfig, option) and others:
            raise _without_effect(
                option, f"{getattr(loss, option)} with {', '.join(others)}", _KINDS_USING[option]
            )
    if loss.alpha_coefficient != LossConfig.alpha_coefficient and loss.divergence is not Divergence.alpha:
        raise ConfigError(
            "loss.alpha_coefficient has no effect with this divergence",
            where="loss.alpha_coefficient, loss.divergence",
            got=f"{loss.alpha_coefficient:g}, {loss.divergence}",
            expected="loss.divergence=alpha",
            remedy="leave loss.alpha_coefficient out or set loss.divergence=alpha",
        )


def _without_effect(option: str, got: str, users: Iterable[LossKind]) -> ConfigError:
    return ConfigError(
        f"loss.{option} has no effect with this loss",
        where=f"loss.{option}",
        got=got,
        expected=f"a loss that uses it: {', '.join(sorted(users))}",
        remedy=f"leave loss.{option} out or choose another loss.kind",
    )
