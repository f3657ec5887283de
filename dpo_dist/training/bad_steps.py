"""Steps whose loss or gradient is not finite: skipped on all ranks, counted, and in the end an error.

DeepSpeed applies no update whose gradient norm is not finite, and the norm is the same on all ranks.
"""

import json
import math

from torch import Tensor, nan, where

from dpo_dist.atomic import write_text
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.sampler import Indices
from dpo_dist.errors import DivergedError


def never_finite_if_not(loss: Tensor, logps: Tensor) -> Tensor:
    """Return `loss`, whose gradient is not finite if the loss is not, so that no rank applies the update.

    Args:
        loss: of a micro-batch; a pair whose loss is infinite may have no gradient of its own.
        logps: of its responses, through which the gradient flows; [n].
    """
    return loss + where(loss.detach().isfinite(), 0.0, nan) * logps.sum()


def is_bad(loss: float, grad_norm: float) -> bool:
    """Return whether the mean loss of a step or its gradient norm is not finite."""
    return not (math.isfinite(loss) and math.isfinite(grad_norm))


def write_bad_step(
    folder: RunFolder, step: int, loss: float, grad_norm: float, dataset: PreferenceDataset, pairs: Indices
) -> None:
    """Write source and line of every pair of a bad step to its file in the logs.

    Raises:
        OSError: the file cannot be written.
    """
    origins = [dataset.origin(int(pair)) for pair in pairs]
    content = {
        "step": step,
        "loss": str(loss),
        "grad_norm": str(grad_norm),
        "pairs": [{"source": origin.source, "line": origin.line} for origin in origins],
    }
    write_text(folder.bad_step(step), json.dumps(content, indent=1) + "\n")


def diverged(step: int, loss: float, grad_norm: float, bad_steps: int, folder: RunFolder) -> DivergedError:
    """Return the error of a run with more bad steps than `trainer.max_bad_steps`."""
    return DivergedError(
        f"loss or gradient is not finite at step {step}; this update was not applied",
        where=f"the pairs of this step: {folder.bad_step(step)}",
        got=f"loss {loss}, gradient norm {grad_norm}; bad steps of this run: {bad_steps}",
        remedy="lower optim.lr or raise optim.warmup_ratio, and look at these pairs; the checkpoints before "
        "it are complete",
    )
