"""Regroup a packed batch: responses of one example that cannot share a prompt get copies of it.

Two responses share the computation of their prompt only if the prompt's hidden states are equal for both.
They differ where a model's rotary frequencies depend on the length of the whole sequence, and no prompt can
be shared by a model that mixes tokens outside of attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpo_dist.data.packing import PackedBatch, copied_to


@dataclass(frozen=True)
class Regrouped:
    """The tokens of a packed batch in another layout, which scores the same targets in the same order.

    Attributes:
        layout: as `PackedBatch.layout`, one entry per group of each example.
        groups: group of each entry of `layout`, ascending.
        tokens: int64 [tokens of the layout], index of each token in the batch's `input_ids`; prompts repeat.
        predictors: int64 [targets], index in `tokens` of the token that predicts each target of the batch. On
            the host.
    """

    layout: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    tokens: Tensor
    predictors: npt.NDArray[np.int64]


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
    response, predictors = batch.target_places
    is_own = predictors >= np.array(starts)[response]  # else it is a token of the prompt
    return Regrouped(
        layout=tuple(layout),
        groups=tuple(group for group, _ in sorted(entries)),
        tokens=copied_to(batch.input_ids.device, np.concatenate(indices)),
        predictors=predictors + np.where(is_own, shifts[1, response], shifts[0, response]),
    )
