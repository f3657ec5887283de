"""The trained weights of a checkpoint as a whole, without the processes that wrote it."""

from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from dpo_dist.distributed.checkpoint_manifest import ENGINE, find_faults
from dpo_dist.errors import CheckpointError

_WHOLE = "mp_rank_00_model_states.pt"
_PREFIX = "causal_lm."


def whole_weights(folder: Path) -> dict[str, Tensor]:
    """Return all trained weights of a checkpoint by transformers name, in host memory.

    Those sharded by ZeRO-3 are the float32 master weights; others are in the precision of training.

    Raises:
        CheckpointError: its files do not match its manifest.
    """
    if faults := find_faults(folder, 0, 1):
        raise CheckpointError(
            "the checkpoint is damaged",
            where=str(folder),
            got="; ".join(faults[:5]),
            remedy="restore its files, or name another checkpoint",
        )
    file = folder / ENGINE / _WHOLE
    if file.is_file():
        # Written by this program and checked against the manifest, so unpickling is safe.
        weights = torch.load(file, map_location="cpu", weights_only=False)["module"]
    else:
        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=ENGINE, exclude_frozen_parameters=True
        )
    return {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
