"""Measure what a prefix tree over the examples of a dataset saves."""

import numpy as np

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.plan import shares_in_bins
from dpo_dist.data.encoded.dataset import PreferenceDataset

_BINS_AT_ONCE = 1024
_TOKENS_ONLY = ComputeCosts(key=0.0, target=0.0, prefixes=True)


def saved_by_tree(dataset: PreferenceDataset, examples: int, *, in_order: bool = False) -> float:
    """Return the share of the tokens with shared prompts that trees over so many examples save.

    These are random ones, or, with `in_order`, neighbours in the order in which the reference scores.
    """
    order = np.random.default_rng(0).permutation(len(dataset))
    if in_order and dataset.prefixes is not None:
        order = np.argsort(dataset.prefixes.places, kind="stable")
    computed = tokens = 0
    for start in range(0, len(order), examples * _BINS_AT_ONCE):
        block = order[start : start + examples * _BINS_AT_ONCE]
        responses, counts = dataset.response_indices(block), dataset.response_counts(block)
        sizes = dataset.sizes(block, responses, counts, _TOKENS_ONLY)
        shared = shares_in_bins(sizes, _TOKENS_ONLY, np.arange(len(block)) // examples).tokens
        computed += int((sizes.tokens - shared).sum())
        tokens += int(sizes.prompt_shared_tokens.sum())
    return 1 - computed / tokens if tokens else 0.0
