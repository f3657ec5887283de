"""Plans of micro-batches whose rows are padded, and sizes of examples that share no prompt."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.pack import rows_of
from dpo_dist.batching.plan import Arrangement, ComputeCosts, example_sizes, plan_micro_batches
from dpo_dist.data.collate import shard_batch
from tests.support.packing import dataset_of, pack_unkeyed, pair_shapes, random_pairs

SINGLE, PADDED = ComputeCosts(0.001, 0.1, Arrangement.single), ComputeCosts(0.001, 0.1, Arrangement.padded)


@given(pair_shapes)
def test_sizes_are_those_of_the_rows(shapes: list[tuple[int, ...]]) -> None:
    prompts = np.array([prompt for prompt, *_ in shapes])
    responses = np.array([tokens for _, *of_example in shapes for tokens in of_example])
    counts = np.array([len(shape) - 1 for shape in shapes])
    for costs in (SINGLE, PADDED):
        sizes = example_sizes(prompts, responses, counts, costs)
        for place, pair in enumerate(random_pairs(shapes)):
            lengths = np.array(rows_of(pack_unkeyed([pair]), 0).lengths)
            assert sizes.tokens[place] == sizes.rows_tokens[place] == lengths.sum()
            assert sizes.attended[place] == (lengths * (lengths + 1) // 2).sum()
            if costs is PADDED:
                assert sizes.rows is not None
                assert sizes.longest is not None
                assert (sizes.rows[place], sizes.longest[place]) == (len(lengths), lengths.max())


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(50, 2000),
)
def test_padded_rows_fit_the_budget(shapes: list[tuple[int, int, int]], world_size: int, budget: int) -> None:
    prompts = np.array([prompt for prompt, *_ in shapes])
    responses = np.array([tokens for _, *of_example in shapes for tokens in of_example])
    sizes = example_sizes(prompts, responses, np.full(len(shapes), 2), PADDED)
    plan = plan_micro_batches(sizes, world_size, budget)
    assert sizes.longest is not None
    placed = [index for ranks in plan for own in ranks for index in own]
    assert sorted(placed) == list(range(len(shapes)))
    for ranks in plan:
        assert len(ranks) == world_size
        for own in ranks:
            cells = 2 * len(own) * int(sizes.longest[own].max()) if own else 0
            assert cells <= budget or len(own) == 1
    assert plan == plan_micro_batches(sizes, world_size, budget)


def test_equal_rows_are_as_few_micro_batches_as_fit_and_even() -> None:
    count, world_size = 41, 2
    sizes = example_sizes(np.full(count, 40), np.full(2 * count, 25), np.full(count, 2), PADDED)
    plan = plan_micro_batches(sizes, world_size, 1024)  # eight pairs fit
    assert len(plan) == math.ceil(41 / 8 / world_size)
    assert max(len(own) for ranks in plan for own in ranks) == 7


@pytest.mark.parametrize("only_chosen", [False, True])
def test_each_micro_batch_knows_the_most_responses_of_a_rank(only_chosen: bool) -> None:
    data = dataset_of(random_pairs([(5, 2, 3), (30, 9, 8, 7), (4, 6), (3, 2, 2)]))
    plans = [
        shard_batch(data, np.arange(4), rank, 3, 40, SINGLE, only_chosen=only_chosen) for rank in range(3)
    ]
    batches = [list(plan.batches()) for plan in plans]
    for of_ranks in zip(*batches, strict=True):
        most = max(len(batch.response_tokens) for batch in of_ranks)
        assert {batch.forwards for batch in of_ranks} == {max(2, most)}
