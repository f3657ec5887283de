"""Check a user's own loss (`loss.kind=custom`) on a few invented pairs before anything depends on it."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.user_code import find_function, user_function
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import preference_loss


def check_custom_loss(config: LossConfig, device: torch.device | None = None) -> str | None:
    """Call `loss.function` on three pairs, forward and backward.

    Args:
        config: the loss; one that does not use `loss.function` is accepted.
        device: on which the run computes; by default the CPU.

    Returns:
        The function with its file and source digest, for the log; None for a loss without one.

    Raises:
        ConfigError: the function cannot be imported, fails, or does not return a finite, differentiable loss
            for each pair that is independent of the other pairs.
    """
    if LossKind.custom not in config.kinds:
        return None
    user_function(config.function)
    alone = replace(config, kind=LossKind.custom, terms=[])
    policy, reference = _invented_pairs(device or torch.device("cpu"))
    losses = _called(policy, reference, alone)
    if losses.is_complex():
        raise _refused("complex numbers", losses.real, "real losses")
    if not torch.isfinite(losses).all():
        raise _refused("values that are not finite", losses, "finite losses for finite log-probs")
    with _errors_named(config):
        gradients = _gradients(losses, policy)
    if not gradients:
        raise _refused(
            "a loss without a gradient", losses, "a loss computed from policy.chosen or policy.rejected"
        )
    if not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise _refused("gradients that are not finite", losses, "finite gradients for finite log-probs")
    first = _called(_first(policy), _first(reference), alone)
    if not torch.allclose(first, losses[:1]):
        raise _refused(
            f"for the first of three pairs {losses[0].item():g}, and for that pair alone {first.item():g}",
            losses,
            "a loss of each pair that does not depend on the other pairs (no mean, no sorting over pairs)",
        )
    return f"custom loss {find_function(config.function)}"


def _called(policy: PairLogps, reference: PairLogps, config: LossConfig) -> Tensor:
    with _errors_named(config):
        return preference_loss(policy, reference, config)


def _gradients(losses: Tensor, policy: PairLogps) -> list[Tensor]:
    """Return the gradients with respect to those log-probs that `losses` depends on."""
    if not losses.requires_grad:
        return []
    found = torch.autograd.grad(losses.sum(), (policy.chosen, policy.rejected), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@contextlib.contextmanager
def _errors_named(config: LossConfig) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the user's code can raise anything, and call sys.exit
        raise ConfigError(
            "the loss function raises an error",
            where="loss.function",
            got=f"{config.function} on three invented pairs: {type(error).__name__}: {error}",
            expected="function(policy: PairLogps, reference: PairLogps, config: LossConfig) -> Tensor",
            remedy="correct the function; docs/python.md describes its arguments",
        ) from error


def _refused(got: str, losses: Tensor, expected: str) -> ConfigError:
    return ConfigError(
        "the loss function cannot be used for training",
        where="loss.function",
        got=f"{got}; losses {[round(loss, 6) for loss in losses.tolist()]}",
        expected=expected,
        remedy="correct the function; docs/python.md describes what it must return",
    )


def _invented_pairs(device: torch.device) -> tuple[PairLogps, PairLogps]:
    """Return policy and reference log-probs of three pairs; those of the policy require a gradient."""

    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    tokens = (column(20, 35, 12), column(25, 28, 40))
    policy = PairLogps(
        column(-40, -70, -25).requires_grad_(), column(-45, -60, -90).requires_grad_(), *tokens
    )
    return policy, PairLogps(column(-42, -66, -25), column(-44, -63, -80), *tokens)


def _first(pairs: PairLogps) -> PairLogps:
    return PairLogps(pairs.chosen[:1], pairs.rejected[:1], pairs.chosen_tokens[:1], pairs.rejected_tokens[:1])
