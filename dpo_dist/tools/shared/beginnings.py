"""Measure what a prefix tree over the examples of a dataset saves."""

import numpy as np

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.prefix_tree import prefix_tree
from dpo_dist.batching.prefixes import Row
from dpo_dist.data.encoded.dataset import PreferenceDataset

_BATCHES = 32
_TOKENS_ONLY = ComputeCosts(key=0.0, target=0.0, prefixes=True)


def saved_by_tree(dataset: PreferenceDataset, examples: int, *, in_order: bool = False) -> float:
    """Return the share of the tokens with shared prompts that trees over so many examples save.

    It is that of 32 batches, or of all if there are fewer: random ones, or, with `in_order`, ones of
    neighbours in the order in which the reference scores, for which `dataset.prefixes` has to be known.
    """
    order = np.random.default_rng(0).permutation(len(dataset))
    if in_order:
        assert dataset.prefixes is not None
        order = np.argsort(dataset.prefixes.places, kind="stable")
    starts = np.arange(0, len(order), examples)
    plain = computed = 0
    for start in starts[:: -(-len(starts) // _BATCHES)]:
        rows, layout = list[Row](), list[tuple[int, ...]]()
        for example in map(dataset.example, order[start : start + examples]):
            rows += example.rows
            layout.append((len(example.prompt_ids), *(len(ids) - 1 for ids in example.responses)))
        plain += sum(map(sum, layout))
        computed += sum(segment.own for segment in prefix_tree(rows, layout, _TOKENS_ONLY))
    return 1 - computed / plain if plain else 0.0
