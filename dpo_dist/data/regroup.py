"""Regroup a packed batch: responses of one example that cannot share a prompt get copies of it.

Two responses share the computation of their prompt only if the prompt's hidden states are equal for both.
They differ where a model's rotary frequencies depend on the length of the whole sequence, and no prompt can
be shared by a model that mixes tokens outside of attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.packing import PackedBatch


@dataclass(frozen=True)
class Regrouped:
    """The tokens of a packed batch in another layout, which scores the same targets in the same order.

    Attributes:
        layout: as `PackedBatch.layout`, one entry per group of each example.
        groups: group of each entry of `layout`, ascending.
        tokens: int64 [tokens of the layout], index of each token in the batch's `input_ids`; prompts repeat.
        predictors: int64 [targets], index in `tokens` of the token that predicts each target of the batch.
    """

    layout: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    tokens: Tensor
    predictors: Tensor


def regroup(batch: PackedBatch, groups: Sequence[int]) -> Regrouped:
    """Return `batch` with each example divided by the groups of its responses.

    Responses of an example that are in one group share a prompt. The entries of the new layout are in order
    of their groups, so that the tokens of a group are contiguous. With a group of its own for every response
    (`range(len(groups))`), entry `i` is the prompt with response `i` alone.

    Args:
        batch: on any device; the result is on the same device, without a synchronization.
        groups: group of each response, in the order of the batch's layout.
    """
    entries: dict[tuple[int, int], list[int]] = {}
    examples: list[int] = []  # of each response
    starts: list[int] = []  # of each response, in `input_ids`
    start = 0
    for example, (prompt, *responses) in enumerate(batch.layout):
        prompt_start, start = start, start + prompt
        for tokens in responses:
            entries.setdefault((groups[len(starts)], prompt_start), []).append(len(starts))
            examples.append(example)
            starts.append(start)
            start += tokens
    lengths = [tokens for _, *responses in batch.layout for tokens in responses]
    layout, indices = [], []
    shifts = np.zeros((2, len(starts)), dtype=np.int64)  # of the prompt's tokens and the response's own
    end = 0
    for (_, prompt_start), members in sorted(entries.items()):
        prompt = batch.layout[examples[members[0]]][0]
        layout.append((prompt, *(lengths[member] for member in members)))
        indices.append(np.arange(prompt_start, prompt_start + prompt))
        shifts[0, members] = end - prompt_start
        end += prompt
        for member in members:
            indices.append(np.arange(starts[member], starts[member] + lengths[member]))
            shifts[1, member] = end - starts[member]
            end += lengths[member]
    device = batch.predictors.device
    return Regrouped(
        layout=tuple(layout),
        groups=tuple(group for group, _ in sorted(entries)),
        tokens=copied_to(device, np.concatenate(indices)),
        predictors=_shifted(batch, copied_to(device, np.array(starts)), copied_to(device, shifts)),
    )


def _shifted(batch: PackedBatch, starts: Tensor, shifts: Tensor) -> Tensor:
    """Return the batch's predictors, each a token of a prompt or of its response, after the shifts."""
    response = torch.repeat_interleave(batch.response_tokens, output_size=len(batch.predictors))
    is_own = batch.predictors >= starts[response]
    return batch.predictors + torch.where(is_own, shifts[1, response], shifts[0, response])


def copied_to(device: torch.device, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
    """Return a copy on `device`, transferred asynchronously from pinned memory."""
    source = torch.from_numpy(array)
    return source.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else source.to(device)
