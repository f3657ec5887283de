"""Sizes of examples, and what they cost a model to compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.batching.prefixes import Counts, Prefixes

Costs = npt.NDArray[np.float64]


class Arrangement(StrEnum):
    """How a forward arranges the responses of a micro-batch, from the cheapest way to the costliest.

    `packed`: one sequence, each prompt computed once. `padded`: one response per row, as long as the longest.
    `single`: one forward per response.
    """

    packed = "packed"
    padded = "padded"
    single = "single"

    def computed_tokens(self, packed: int, rows: Sequence[int]) -> int:
        """Return how many tokens the forwards compute for rows of these lengths.

        `packed`: with each shared token once.
        """
        if self is Arrangement.packed:
            return packed
        return len(rows) * max(rows) if self is Arrangement.padded else sum(rows)


# SDPA on a CPU computes causal attention in blocks of this many keys: a mask costs no more in shorter rows.
_BLOCK = 512


@dataclass(frozen=True)
class ComputeCosts:
    """Compute time of a model, in units of the time that its layers' matrices take for one token."""

    key: float  # time of one query-key pair, in all layers
    target: float  # time of one target in the output layer
    arrangement: Arrangement = Arrangement.packed  # of the responses in a forward
    reference_pads: bool = False  # whether a live reference computes padded rows, whatever the arrangement is
    image: float = 0.0  # time that the tower takes for one placeholder's share of an image
    beyond_prompts: bool = False  # whether more than prompts is shared: what examples begin with
    copy: float = 0.0  # time to copy the key and value of a shared token for one more row, in all layers
    copy_memory: float = 0.0  # memory of these copies, in units of what a token takes
    is_masked: bool = False  # whether a row that shares tokens needs a mask, whose hidden pairs are computed
    # A segment that shares tokens costs this many more than their copies: fewer are not worth it. One core of
    # an AMD EPYC joins a segment's keys in 0.04 to 0.1 ms a layer, and computes a token of SmolLM2-135M in
    # 0.27 ms.
    per_segment: float = 4.0

    @property
    def shares_prefixes(self) -> bool:
        """Whether a forward computes tokens once with which several responses begin."""
        return self.beyond_prompts and self.arrangement is Arrangement.packed

    @property
    def pads_rows(self) -> bool:
        """Whether a forward computes rows with padding."""
        return self.reference_pads or self.arrangement is Arrangement.padded

    def saved_by_sharing(self, shared: Counts, own: Counts) -> Costs:
        """Return the time that rows with `own` other tokens save by not computing `shared` ones again.

        The more `own` tokens, the less.
        """
        row = shared + own
        pairs = causal_pairs(shared)
        if self.is_masked:
            # A whole row is computed in blocks up to the diagonal, own queries behind a mask with all keys.
            pairs = np.minimum(pairs, causal_pairs(row) + row * _BLOCK // 2 - own * row)
        saved = shared * (1 - self.copy) + self.key * pairs
        return np.where(shared > 0, saved - self.per_segment, 0.0)

    def worth_sharing(self, common: Counts, tokens: Counts) -> Counts:
        """Return how many leading tokens `common` with another row are shared: none if it costs more."""
        return np.where(self.saved_by_sharing(common, tokens - common) > 0, common, 0)


@dataclass(frozen=True)
class ExampleSizes:
    """Sizes of examples in micro-batches, [examples] each."""

    tokens: Counts  # that a forward computes, without padding; they decide the memory
    prompt_shared_tokens: Counts  # the same if nothing but the prompt is shared
    unshared_tokens: Counts  # of the plain batch, which has the prompt once for each response
    targets: Counts  # completion tokens to score
    attended: Counts  # query-key pairs of attention in a layer in which tokens see all earlier ones
    costs: Costs  # compute time in units of `ComputeCosts`
    longest: Counts  # tokens of the longest row, a prompt with a response
    responses: Counts  # their number
    image_tokens: Counts | None = None  # placeholders of images in the prompts; None: there are no images
    prefixes: Prefixes | None = None  # None: examples share nothing

    def select(self, indices: Counts) -> "ExampleSizes":
        """Return the sizes of the examples at `indices`."""
        selected: dict[str, Any] = {
            name: sizes.select(indices) if isinstance(sizes, Prefixes) else sizes[indices]
            for name, sizes in vars(self).items()
            if sizes is not None
        }
        return ExampleSizes(**selected)


def example_sizes(
    prompt_tokens: Counts,
    response_tokens: Counts,
    targets: Counts,
    counts: Counts,
    begins: Counts,
    costs: ComputeCosts,
    image_tokens: Counts | None = None,
) -> ExampleSizes:
    """Return the sizes of examples for a model with these costs.

    `prompt_tokens`, the `image_tokens` in them (None: no images), and `counts`, the numbers of responses (at
    least one), are [examples]; `response_tokens`, `targets`, those that the loss counts, and `begins`, those
    with which another response of the example begins, are [responses], example after example.
    """
    firsts = np.cumsum(counts) - counts
    prompts = np.repeat(prompt_tokens, counts)
    rows = prompts + response_tokens - 1
    shared = prompts
    if costs.shares_prefixes:
        shared = np.maximum(shared, costs.worth_sharing(prompts + begins, rows))
    # How often a prompt is computed.
    copies = np.where(costs.arrangement is Arrangement.packed, 1, counts)
    tokens = copies * prompt_tokens + np.add.reduceat(rows - shared, firsts)
    in_responses = causal_pairs(rows) - causal_pairs(shared)
    attended = copies * causal_pairs(prompt_tokens) + np.add.reduceat(in_responses, firsts)
    targets = np.add.reduceat(targets, firsts)
    # Attention of a token to itself is included in the cost of a token.
    compute = tokens + costs.key * (attended - tokens / 2) + costs.target * targets
    if image_tokens is not None:
        compute = compute + costs.image * image_tokens
    return ExampleSizes(
        tokens,
        prompt_shared_tokens=copies * prompt_tokens + np.add.reduceat(rows - prompts, firsts),
        unshared_tokens=np.add.reduceat(rows, firsts),
        targets=targets,
        attended=attended,
        costs=compute,
        longest=np.maximum.reduceat(rows, firsts),
        responses=counts,
        image_tokens=image_tokens,
    )


def causal_pairs(tokens: Counts) -> Counts:
    """Return the number of query-key pairs of sequences in which tokens see all earlier tokens."""
    return tokens * (tokens + 1) // 2
