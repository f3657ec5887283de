"""How pairs lie in memory: no padding, every prompt once.

A packed micro-batch is one row of tokens. A pair is laid out as ``[prompt, response, response, ...]``; the
positions of every response restart at the prompt's length, and attention (model/attention.py) lets each
response see its own prompt only. A response's last token predicts nothing and is not laid out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sequences:
    """One prompt and the responses to score after it (token ids)."""

    prompt_ids: Ids
    responses: tuple[Ids, ...]


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank.

    Attributes:
        input_ids: int64 [tokens].
        position_ids: int64 [tokens].
        layout: for each pair the lengths of its pieces in `input_ids`: prompt, response, response, ...
        predictors: int64 [targets], the place in `input_ids` whose hidden state predicts each target. The
            first token of every response is predicted by the prompt's last.
        targets: int64 [targets], completion tokens, response after response.
        response_tokens: int64 [responses], completion tokens of each response.
        keys: uint64 [responses, 2], content address of each response; none for a dummy. Stays on the host.
        weights: float32 [pairs], 1, or 0 for a dummy: a batch that only keeps the ranks in step (law L2).
        ranking: int64 [pairs, 2 + n], places of each pair's best response, its worst, and those between them,
            -1 where there is none; None where every pair has two responses.
        score_gaps: float32 [pairs], score of the best response minus that of the worst; nan without scores.
        token_weights: float32 [targets], by which log-probs are multiplied, where the loss has such weights.
        reference_logps: float32 [targets], the reference's log-probs, where they are known beforehand.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: tuple[tuple[int, ...], ...]
    predictors: Tensor
    targets: Tensor
    response_tokens: Tensor
    keys: npt.NDArray[np.uint64]
    weights: Tensor
    ranking: Tensor | None = None
    score_gaps: Tensor | None = None
    token_weights: Tensor | None = None
    reference_logps: Tensor | None = None

    @property
    def pair_tokens(self) -> list[tuple[int, ...]]:
        """Completion tokens of each pair's responses."""
        return [tuple(laid_out + 1 for laid_out in responses) for _, *responses in self.layout]

    @property
    def tokens(self) -> int:
        """Tokens computed for real pairs."""
        return len(self.input_ids) if len(self.keys) else 0

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "PackedBatch":
        """The same batch in page-locked memory: a copy from there to a CUDA device does not hold the host."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def packed_tokens(prompt_tokens: int, response_tokens: Sequence[int]) -> int:
    """Tokens that a prompt with its responses takes in a packed batch."""
    return prompt_tokens + sum(tokens - 1 for tokens in response_tokens)


def pack(sequences: Sequence[Sequences], keys: npt.NDArray[np.uint64]) -> PackedBatch:
    """Lay out `sequences`, whose responses have these content `keys`, as one micro-batch."""
    inputs: list[Ids] = []
    positions: list[npt.NDArray[np.int64]] = []
    predictors: list[npt.NDArray[np.int64]] = []
    layout: list[tuple[int, ...]] = []
    start = 0
    for pair in sequences:
        prompt_tokens = len(pair.prompt_ids)
        lengths = [prompt_tokens]
        inputs.append(pair.prompt_ids)
        positions.append(np.arange(prompt_tokens))
        boundary, start = start + prompt_tokens - 1, start + prompt_tokens
        for response in pair.responses:
            tokens = len(response) - 1
            inputs.append(response[:-1])
            positions.append(np.arange(prompt_tokens, prompt_tokens + tokens))
            predictors.append(np.concatenate(([boundary], np.arange(start, start + tokens))))
            lengths.append(tokens)
            start += tokens
        layout.append(tuple(lengths))
    responses = [response for pair in sequences for response in pair.responses]
    return PackedBatch(
        input_ids=_int64(np.concatenate(inputs)),
        position_ids=_int64(np.concatenate(positions)),
        layout=tuple(layout),
        predictors=_int64(np.concatenate(predictors)),
        targets=_int64(np.concatenate(responses)),
        response_tokens=_int64(np.array([len(response) for response in responses])),
        keys=keys,
        weights=torch.ones(len(sequences)),
        ranking=_ranking([len(pair.responses) for pair in sequences]),
    )


def dummy_batch() -> PackedBatch:
    """The smallest batch that takes part in a forward and weighs nothing."""
    one = np.zeros(1, dtype=np.int32)
    batch = pack([Sequences(one, (one, one))], np.empty((0, 2), dtype=np.uint64))
    return replace(batch, weights=torch.zeros(1), score_gaps=torch.ones(1))


def _ranking(counts: Sequence[int]) -> Tensor | None:
    """`PackedBatch.ranking` of pairs with so many responses each."""
    if set(counts) == {2}:
        return None
    ranking = np.full((len(counts), max(2, *counts)), -1)
    start = 0
    for pair, count in enumerate(counts):
        ranking[pair, 0] = start
        if count > 1:
            ranking[pair, 1] = start + count - 1
            ranking[pair, 2:count] = np.arange(start + 1, start + count - 1)
        start += count
    return _int64(ranking)


def _int64(array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
