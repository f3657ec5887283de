"""What a dataset says of the tokens that its examples share, against the examples themselves."""

import random
from itertools import pairwise, product

import numpy as np

from dpo_dist.batching.costs import ComputeCosts, ExampleSizes
from dpo_dist.batching.pack import pack
from dpo_dist.batching.prefixes import common_tokens, input_rows
from dpo_dist.batching.sampler import Indices
from dpo_dist.data.example import Example
from dpo_dist.encoded.dataset import PreferenceDataset
from tests.support.packing import SHARING


def sizes_of(
    data: PreferenceDataset, indices: Indices, which: int | None = None, costs: ComputeCosts = SHARING
) -> ExampleSizes:
    responses, counts = data.response_indices(indices), data.response_counts(indices)
    if which is not None:
        responses, counts = responses[np.cumsum(counts) - counts] + which, np.ones_like(counts)
    return data.sizes(indices, responses, counts, costs)


def some_of(data: PreferenceDataset, draw: random.Random) -> Indices:
    """Return some of the examples, in the order of their places."""
    assert data.prefixes is not None
    some = np.array(draw.sample(range(len(data)), draw.randint(1, len(data))))
    return some[np.argsort(data.prefixes.places[some], kind="stable")]


def most_in_common(first: Example, second: Example) -> int:
    return max(common_tokens(*rows) for rows in product(input_rows(first), input_rows(second)))


def check_claims(
    data: PreferenceDataset, indices: Indices, which: int | None = None, *, is_exact: bool = False
) -> None:
    """Check what the sizes of examples say of shared tokens against the examples themselves, and `pack`."""
    sizes = sizes_of(data, indices, which)
    assert sizes.prefixes is not None
    claimed = sizes.prefixes.common_with_previous()
    examples = [data.example(int(index), None if which is None else [which]) for index in indices]
    sources = np.searchsorted(np.cumsum(data.source_pairs), indices, side="right")
    records = data.origins[indices].tolist()
    firsts = {
        tuple(place): input_rows(data.example(index))[0]
        for index, place in reversed([*enumerate(data.origins.tolist())])
    }
    assert claimed[0] == 0
    for number, (one, two) in enumerate(pairwise(range(len(indices))), start=1):
        rows = [firsts[tuple(records[at])] for at in (one, two)]
        if sources[one] != sources[two]:
            assert claimed[number] == 0
        elif all(
            any(np.array_equal(row, own) for own in input_rows(examples[at]))
            for at, row in zip((one, two), rows, strict=True)
        ):
            assert claimed[number] == common_tokens(*rows)
        assert claimed[number] <= most_in_common(examples[one], examples[two])
    planned = sizes.tokens.sum() - SHARING.worth_sharing(claimed, sizes.tokens).sum()
    responses = sum(len(example.responses) for example in examples)
    packed = pack(examples, np.zeros((responses, 2), dtype=np.uint64), costs=SHARING).tokens
    assert planned == packed if is_exact else planned >= packed
