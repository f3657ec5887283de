"""dpo_dist without one of its optimisations; functions of this process are patched.

The package has no switches for them, because nobody should train without. The computed function does not
change, so losses must be equal. One process only.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from dpo_dist.data import collate, dataset
from dpo_dist.data.micro_batches import Counts, ExampleSizes, example_sizes
from dpo_dist.data.packing import PackedBatch, Sequences, pack
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.logp_head import LogpHead
from dpo_dist.objective.token_logps import Statistic

Forward = Callable[[PackedCausalLM, PackedBatch, Sequence[Statistic]], Tensor]
HeadForward = Callable[[LogpHead, Tensor, Tensor | None, Sequence[Statistic]], Tensor]


class Packing(StrEnum):
    """Layout of the pairs of a step in micro-batches."""

    packed = "packed"
    single = "single"
    padded = "padded"


@dataclass(frozen=True)
class Ablation:
    """Optimisations that stay.

    Attributes:
        shares_prompts: a prompt is computed once for both responses, not once for each.
        packing: as many tokens as fit the budget; one pair at a time; or sequences padded to the longest of
            their micro-batch, in the order of the sampler, as many as fit the budget.
        chunks_head: logits of some completion tokens at a time, not of all tokens at once.
        stores_reference: reference log-probs come from the store, not from a live model.
    """

    shares_prompts: bool = True
    packing: Packing = Packing.packed
    chunks_head: bool = True
    stores_reference: bool = True

    @property
    def overrides(self) -> list[str]:
        """Command-line overrides of the run."""
        return [] if self.stores_reference else ["reference.mode=live"]


ABLATIONS = {
    "dpo_dist": Ablation(),
    "without_sharing": Ablation(shares_prompts=False),
    "without_packing_single": Ablation(packing=Packing.single),
    "without_packing_padded": Ablation(packing=Packing.padded),
    "without_chunks": Ablation(chunks_head=False),
    "without_store": Ablation(stores_reference=False),
    "without_all": Ablation(False, Packing.padded, False, False),
}


@dataclass
class Work:
    """Work of training so far: forwards with a graph, their tokens, and rows of logits."""

    micro_batches: int = 0
    tokens: int = 0
    most_tokens: int = 0
    logits: int = 0


@contextlib.contextmanager
def removed(ablation: Ablation) -> Iterator[Work]:
    """Patch the program for the runs of the body; yield their work."""
    work = Work()
    forward, head = (_forward, _head) if ablation.chunks_head else (_forward_all_logits, _all_logps)
    with contextlib.ExitStack() as swaps:
        if not ablation.shares_prompts:
            swaps.enter_context(patch.object(dataset, "example_sizes", _sizes_apart(ablation.packing)))
        if ablation.packing is not Packing.packed:
            plan = _plan_single if ablation.packing is Packing.single else _plan_padded
            swaps.enter_context(patch.object(collate, "plan_micro_batches", plan))
        if not ablation.shares_prompts or ablation.packing is Packing.padded:
            swaps.enter_context(patch.object(collate, "pack", _packing(ablation)))
        swaps.enter_context(patch.object(PackedCausalLM, "forward", _counting_tokens(forward, work)))
        swaps.enter_context(patch.object(LogpHead, "forward", _counting_logits(head, work)))
        yield work


def _counting_tokens(forward: Forward, work: Work) -> Forward:
    def counted(model: PackedCausalLM, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        if torch.is_grad_enabled():
            work.micro_batches += 1
            work.tokens += len(batch.input_ids)
            work.most_tokens = max(work.most_tokens, len(batch.input_ids))
        return forward(model, batch, statistics)

    return counted


def _counting_logits(forward: HeadForward, work: Work) -> HeadForward:
    def counted(
        head: LogpHead,
        hidden: Tensor,
        targets: Tensor | None = None,
        statistics: Sequence[Statistic] = (),
    ) -> Tensor:
        if torch.is_grad_enabled():
            work.logits += len(hidden)
        return forward(head, hidden, targets, statistics)

    return counted


_forward: Forward = PackedCausalLM.forward  # type: ignore[assignment]  # log-probs, without routing
_head: HeadForward = LogpHead.forward


def _forward_all_logits(model: PackedCausalLM, batch: PackedBatch, statistics: Sequence[Statistic]) -> Tensor:
    """Return the model's forward with every token through the head (`_all_logps`), prompts too."""
    if model.own_logits:  # the check at start
        return _forward(model, batch, statistics)
    places = np.zeros((2, len(batch.input_ids)), dtype=np.int64)
    places[1] = np.arange(len(batch.input_ids))
    logps = _forward(model, replace(batch, target_places=places), statistics)
    return logps[batch.predictors, batch.targets]


def _all_logps(
    head: LogpHead, hidden: Tensor, targets: Tensor | None, _statistics: Sequence[Statistic]
) -> Tensor:
    """Return float32 log-probs [n, vocab] of [n, hidden_size]; the caller selects the targets."""
    if targets is None:
        return _head(head, hidden, None, ())
    return nn.Linear.forward(head, hidden).float().log_softmax(-1)


def _sizes_apart(packing: Packing) -> Callable[..., ExampleSizes]:
    """`example_sizes` if every response has its own prompt; padded: all responses of a pair of one length."""

    def sizes(prompt_tokens: Counts, response_tokens: Counts, responses: Counts, *rest: Any) -> ExampleSizes:
        prompts = np.repeat(prompt_tokens, responses)
        apart = example_sizes(prompts, response_tokens, np.ones_like(prompts), *rest)
        firsts = np.cumsum(responses) - responses
        tokens = np.add.reduceat(apart.tokens, firsts)
        if packing is Packing.padded:
            tokens = responses * np.maximum.reduceat(apart.tokens, firsts)
        targets, attended, costs = (
            np.add.reduceat(counts, firsts) for counts in (apart.targets, apart.attended, apart.costs)
        )
        return ExampleSizes(tokens, tokens, targets, attended, costs)

    return sizes


def _plan_single(sizes: ExampleSizes, world_size: int, _token_budget: int) -> list[list[list[int]]]:
    """`plan_micro_batches` with one pair each."""
    assert world_size == 1
    return [[[index]] for index in range(len(sizes.tokens))]


def _plan_padded(sizes: ExampleSizes, world_size: int, token_budget: int) -> list[list[list[int]]]:
    """`plan_micro_batches` with pairs in their order, as many as fit when as long as the longest."""
    assert world_size == 1
    plan: list[list[list[int]]] = []
    longest = 0
    for index, tokens in enumerate(sizes.tokens.tolist()):
        longest = max(longest, tokens)
        if plan and (len(plan[-1][0]) + 1) * longest <= token_budget:
            plan[-1][0].append(index)
        else:
            plan.append([[index]])
            longest = tokens
    return plan


def _packing(ablation: Ablation) -> Callable[..., PackedBatch]:
    """Return `pack` with this ablation's layout."""

    def packed(pairs: Sequence[Sequences], keys: Any) -> PackedBatch:
        pieces = pairs if ablation.shares_prompts else [alone for pair in pairs for alone in _apart(pair)]
        padded = ablation.packing is Packing.padded
        batch = _pack_padded(pieces, keys) if padded else pack(pieces, keys)
        return replace(batch, weights=torch.ones(len(pairs)), ranking=None)

    return packed


def _apart(pair: Sequences) -> list[Sequences]:
    return [Sequences(pair.prompt_ids, (response,)) for response in pair.responses]


def _pack_padded(pieces: Sequence[Sequences], keys: Any) -> PackedBatch:
    """Pad all pieces to the longest one: padding is packed as a response without targets."""
    lengths = [
        len(piece.prompt_ids) + sum(len(response) - 1 for response in piece.responses) for piece in pieces
    ]
    padded = [
        Sequences(piece.prompt_ids, (*piece.responses, np.zeros(max(lengths) - length + 1, dtype=np.int32)))
        for piece, length in zip(pieces, lengths, strict=True)
    ]
    batch = pack(padded, keys)
    ends = np.cumsum([len(piece.responses) for piece in padded])
    is_real = torch.ones(len(batch.response_tokens), dtype=torch.bool)
    is_real[torch.from_numpy(ends - 1)] = False
    kept = is_real.repeat_interleave(batch.response_tokens)
    return replace(
        batch,
        target_places=batch.target_places[:, kept.numpy()],
        targets=batch.targets[kept],
        response_tokens=batch.response_tokens[is_real],
    )
