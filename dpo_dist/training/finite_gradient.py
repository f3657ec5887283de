"""The gradient of a loss that is not finite."""

from torch import Tensor, nan, where


def never_finite_if_not(loss: Tensor, logps: Tensor) -> Tensor:
    """Return `loss`, whose gradient is not finite if the loss is not, so that no rank applies the update.

    Args:
        loss: of a micro-batch; a pair whose loss is infinite may have no gradient of its own.
        logps: of its responses, through which the gradient flows; [n].
    """
    return loss + where(loss.detach().isfinite(), 0.0, nan) * logps.sum()
