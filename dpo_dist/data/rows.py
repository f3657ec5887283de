"""One response per row: the arrangement of a micro-batch for models that cannot share prompts.

A packed micro-batch stays what the program plans, stores and counts. A model that mixes tokens outside of
attention computes it as rows, each of them a prompt with one of its responses, padded at the end.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.packing import PackedBatch, copied_to
from dpo_dist.data.regroup import regroup


@dataclass(frozen=True)
class Rows:
    """The responses of a micro-batch, each in a row behind a prompt of its own.

    Attributes:
        input_ids: int64 [rows, longest], padded at the end.
        lengths: tokens of each row without padding.
        is_token: bool [rows, longest], whether it is not padding.
        predictors: int64 [targets], index in the flat `input_ids` of the token that predicts each target.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    is_token: Tensor
    predictors: Tensor


def rows_of(batch: PackedBatch, pad_id: int) -> Rows:
    """Return `batch` as rows, in the order of its responses; on any device, without a synchronization.

    Args:
        batch: with any layout.
        pad_id: token id of the padding.
    """
    alone = regroup(batch, range(sum(len(pieces) - 1 for pieces in batch.layout)))
    lengths = np.array([sum(pieces) for pieces in alone.layout])
    longest = int(lengths.max())
    # From a token's index in the rows one after the other to that in the padded rows.
    shifts = np.arange(len(lengths)) * longest - (np.cumsum(lengths) - lengths)
    places = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
    device = batch.input_ids.device
    input_ids = torch.full((len(lengths) * longest,), pad_id, dtype=torch.int64, device=device)
    is_token = torch.zeros_like(input_ids, dtype=torch.bool)
    on_device = copied_to(device, places)
    input_ids[on_device] = batch.input_ids[alone.tokens]
    is_token[on_device] = True
    return Rows(
        input_ids=input_ids.view(len(lengths), longest),
        lengths=tuple(lengths.tolist()),
        is_token=is_token.view(len(lengths), longest),
        predictors=copied_to(device, alone.predictors + shifts[batch.target_places[0]]),
    )
