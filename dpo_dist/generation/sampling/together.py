"""Generate responses of the policy on all ranks together, whatever its sharding."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from dpo_dist.distributed.world import World
from dpo_dist.generation.sampling.generate import (
    NotFiniteError,
    Request,
    Sample,
    Sampling,
    batches,
    generate_batch,
)


class Generator(Protocol):
    """A model on all ranks that generates, such as a `PolicyEngine`."""

    @property
    def is_synchronised(self) -> bool:
        """Whether each forward is collective."""

    def generating(self, *, of_base: bool = False) -> AbstractContextManager[Any]:
        """Return a context with the transformers model; `of_base`: without its adapter."""


def generate_together(
    model: Generator,
    requests: Sequence[Request],
    sampling: Sampling,
    stop_ids: Collection[int],
    budget: int,
    world: World,
    *,
    of_base: bool = False,
    give_way: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Return the model's sample for each request, in their order, on all ranks; collective.

    Every rank generates a share of similar lengths. Under ZeRO-3 each forward gathers weights from all ranks:
    they generate the same number of batches, and each batch makes as many forwards as the longest of all.

    Args:
        model: the policy in any mode, to which it returns, or a model that is only scored.
        requests: the same on all ranks.
        sampling: settings.
        stop_ids: tokens that end a response, at least one.
        budget: most tokens of a batch.
        world: the processes.
        of_base: generate without the adapter.
        give_way: called before each batch, as often on all ranks; may raise.

    Raises:
        NotFiniteError: the model's logits are not finite; on all ranks.
    """
    shares = [_batches(requests, rank, world.size, sampling, budget) for rank in range(world.size)]
    own, synchronised = shares[world.rank], model.is_synchronised
    samples: dict[int, Sample] = {}
    broken: Request | None = None
    with model.generating(of_base=of_base) as causal_lm:
        for number in range(max(map(len, shares))):
            give_way()
            if number >= len(own) and not synchronised:
                continue
            indices = own[number] if number < len(own) else []
            chosen, settings = [requests[index] for index in indices], sampling
            if not chosen:  # a rank without work takes part in the forwards of the others
                dummy = np.array([min(stop_ids)], dtype=np.int32)
                chosen, settings = [Request(dummy, "", 0)], Sampling(max_new_tokens=1, temperature=0)
            try:
                found = generate_batch(
                    causal_lm, chosen, settings, stop_ids, world.device, is_synchronised=synchronised
                )
            except NotFiniteError as error:  # the other ranks wait in the next batch
                broken = broken or error.request
            else:
                samples |= zip(indices, found, strict=False)
    gathered = world.gather((samples, broken))
    fault = next((request for _, request in gathered if request is not None), None)
    if fault is not None:
        raise NotFiniteError(fault)
    everything = {index: sample for found, _ in gathered for index, sample in found.items()}
    return [everything[index] for index in range(len(requests))]


def _batches(
    requests: Sequence[Request], rank: int, size: int, sampling: Sampling, budget: int
) -> list[list[int]]:
    """Return the indices of each batch of a rank: every `size`-th request, in the order of lengths."""
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))[rank::size]
    share = [requests[index] for index in order]
    return [[order[place] for place in places] for places in batches(share, sampling.max_new_tokens, budget)]
