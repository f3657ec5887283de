"""Check a user's own loss (`loss.kind=custom`) on a few invented pairs before anything depends on it."""

from dataclasses import replace

import torch
from torch import Tensor

from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.user_code import find_function, user_function
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import preference_loss

# Log-probs of three pairs: chosen and rejected under the policy and the reference, and numbers of tokens.
_PAIRS = [[-40, -70, -25], [-45, -60, -90], [-42, -66, -25], [-44, -63, -80], [20, 35, 12], [25, 28, 40]]


def check_custom_loss(config: LossConfig, device: torch.device | None = None) -> str | None:
    """Call `loss.function` on three pairs on `device`, forward and backward; return its description.

    None for a loss that has no such function.
    """
    if LossKind.custom not in config.kinds:
        return None
    user_function(config.function)
    alone = replace(config, kind=LossKind.custom, terms=[])
    columns = torch.tensor(_PAIRS, dtype=torch.float64, device=device)
    try:
        losses, gradients = _try(columns, alone)
        first, _ = _try(columns[:, :1], alone)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the user's code can raise anything, and call sys.exit
        raise _error(f"{type(error).__name__}: {error}", "a function that raises no error") from error
    if losses.is_complex() or not losses.isfinite().all():
        fault, wanted = "values that are not finite real numbers", "finite losses for finite log-probs"
    elif not gradients:
        fault, wanted = "a loss without a gradient", "a loss computed from policy.chosen or policy.rejected"
    elif not all(gradient.isfinite().all() for gradient in gradients):
        fault, wanted = "gradients that are not finite", "finite gradients for finite log-probs"
    elif not torch.allclose(first, losses[:1]):
        fault = f"{losses[0].item():g} for the first pair among three, {first.item():g} for it alone"
        wanted = "a loss of each pair that does not depend on the other pairs (no mean, no sorting over them)"
    else:
        return f"custom loss {find_function(config.function)}"
    raise _error(f"{fault}; {losses.tolist()}", wanted)


def _try(columns: Tensor, config: LossConfig) -> tuple[Tensor, list[Tensor]]:
    """Return the losses of invented pairs, and the gradients by those log-probs that they depend on."""
    leaves = columns[0].clone().requires_grad_(), columns[1].clone().requires_grad_()
    reference = PairLogps(columns[2], columns[3], columns[4], columns[5])
    losses = preference_loss(PairLogps(*leaves, columns[4], columns[5]), reference, config)
    if not losses.requires_grad or losses.is_complex():
        return losses, []
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    return losses, [gradient for gradient in gradients if gradient is not None]


def _error(got: str, expected: str) -> ConfigError:
    return ConfigError(
        "the loss function cannot be used for training",
        where="loss.function",
        got=f"on three invented pairs: {got}",
        expected=expected,
        remedy="correct the function; docs/python.md describes its arguments and what it must return",
    )
