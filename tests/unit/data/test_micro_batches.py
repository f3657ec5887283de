"""Assignment to micro-batches: every example once, within the budget, balanced by cost."""

import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.pack import packed_tokens
from dpo_dist.batching.plan import ComputeCosts, ExampleSizes, Reach, example_sizes, plan_micro_batches
from tests.support.packing import pair_shapes

Plan = list[list[list[int]]]


def sizes(tokens: list[int], costs: list[float] | None = None) -> ExampleSizes:
    counts = np.array(tokens, dtype=np.int64)
    return ExampleSizes(counts, counts, counts, counts, np.array(costs or tokens, dtype=np.float64))


def loads_of(plan: Plan, costs: list[float] | list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return the cost of each micro-batch on each rank."""
    return np.array([[sum(costs[index] for index in indices) for indices in ranks] for ranks in plan])


# Few long pairs and many short ones, and attention that makes long ones dearer.
pairs = st.lists(st.tuples(st.integers(1, 60), st.floats(1, 3)), min_size=1, max_size=200)


@given(pairs, st.integers(1, 9), st.integers(1, 300))
def test_every_example_is_computed_once_within_the_budget(
    pairs: list[tuple[int, float]], world_size: int, budget: int
) -> None:
    tokens = [length for length, _ in pairs]
    of = sizes(tokens, [length * slowness for length, slowness in pairs])
    plan = plan_micro_batches(of, world_size, budget)
    bins = list(chain.from_iterable(plan))
    assert sorted(chain.from_iterable(bins)) == list(range(len(tokens)))
    assert {len(ranks) for ranks in plan} == {world_size}
    for indices in bins:
        assert sum(tokens[index] for index in indices) <= budget or len(indices) == 1
    # No round in which every rank would compute a dummy.
    assert all(any(ranks) for ranks in plan)
    assert plan == plan_micro_batches(of, world_size, budget)


@given(pairs, st.integers(1, 9), st.integers(60, 300))
def test_there_are_at_most_as_many_micro_batches_as_with_first_fit(
    pairs: list[tuple[int, float]], world_size: int, budget: int
) -> None:
    """First fit needs less than twice the volume and one bin; a plan rounds up to all ranks."""
    tokens = [length for length, _ in pairs]
    plan = plan_micro_batches(sizes(tokens), world_size, budget)
    least = math.ceil(sum(tokens) / (world_size * budget))
    assert least <= len(plan) <= math.ceil((2 * sum(tokens) / budget + 1) / world_size)


@given(pairs, st.integers(1, 9))
def test_with_enough_space_no_rank_exceeds_the_mean_by_more_than_one_example(
    pairs: list[tuple[int, float]], world_size: int
) -> None:
    costs = [length * slowness for length, slowness in pairs]
    (micro_batch,) = plan_micro_batches(sizes([length for length, _ in pairs], costs), world_size, 200 * 60)
    loads = loads_of([micro_batch], costs)[0]
    assert loads.max() <= loads.mean() + max(costs) + 1e-6


@pytest.mark.parametrize(
    ("tokens", "world_size", "budget", "expected"),
    [
        ([30, 30, 30, 30], 2, 60, 1),
        ([30, 30, 30, 31], 2, 60, 2),
        ([5], 4, 60, 1),
        ([100, 5, 5], 1, 60, 2),
        ([100, 100, 100], 2, 60, 2),
        ([60] * 8, 4, 60, 2),
        # With the costliest pair in the emptiest bin the last pair does not fit; with the best fit it does.
        ([30, 30, 20, 20, 20], 1, 60, 2),
    ],
)
def test_micro_batches_are_no_more_than_needed(
    tokens: list[int], world_size: int, budget: int, expected: int
) -> None:
    assert len(plan_micro_batches(sizes(tokens), world_size, budget)) == expected


@given(pair_shapes)
def test_sizes_are_packed_tokens_with_costs_of_keys_and_targets(shapes: list[tuple[int, ...]]) -> None:
    prompts = np.array([prompt for prompt, *_ in shapes])
    responses = np.array([tokens for _, *lengths in shapes for tokens in lengths])
    counts = np.array([len(lengths) for _, *lengths in shapes])
    laid_out = [packed_tokens(prompt, lengths) for prompt, *lengths in shapes]
    of = example_sizes(prompts, responses, counts, ComputeCosts(key=0, target=0))
    assert of.tokens.tolist() == of.costs.tolist() == laid_out
    heads = example_sizes(prompts, responses, counts, ComputeCosts(key=0, target=1)).costs - laid_out
    assert heads.tolist() == [sum(lengths) for _, *lengths in shapes]
    keys = example_sizes(prompts, responses, counts, ComputeCosts(key=1, target=0)).costs - laid_out
    # Token n of a sequence sees n keys; half of that square is what a causal kernel computes.
    assert keys.tolist() == [
        prompt**2 / 2 + sum((n - 1) * (prompt + (n - 1) / 2) for n in lengths) for prompt, *lengths in shapes
    ]


@pytest.mark.parametrize(("budget", "micro_batches"), [(8192, 2), (13_000, 1)])
@pytest.mark.parametrize("world_size", [8, 64])
def test_ranks_get_equal_costs(world_size: int, budget: int, micro_batches: int) -> None:
    tokens = np.random.default_rng(0).integers(50, 800, 28 * world_size).tolist()
    costs = [t + t * t / 4_000 for t in tokens]
    plan = plan_micro_batches(sizes(tokens, costs), world_size, budget)
    assert len(plan) == micro_batches
    loads = loads_of(plan, costs)
    assert loads.max(axis=1).sum() < 1.03 * loads.mean() * micro_batches
    assert loads.sum(axis=0).max() < 1.02 * loads.sum(axis=0).mean()


@pytest.mark.parametrize("world_size", [1, 8, 64])
def test_a_nearly_full_budget_needs_no_extra_micro_batch(world_size: int) -> None:
    tokens = np.random.default_rng(0).integers(50, 800, 40 * world_size).tolist()
    for filled in (0.9, 0.95, 0.98):
        budget = round(sum(tokens) / world_size / 2 / filled)
        assert len(plan_micro_batches(sizes(tokens), world_size, budget)) == 2, filled


def test_beside_one_costly_example_the_other_ranks_get_more() -> None:
    """Balancing pairs of cost 1 at 70 in both micro-batches would make all ranks wait for the pair of 100."""
    tokens = [100] + [1] * (4 * 140 - 100)
    loads = loads_of(plan_micro_batches(sizes(tokens), 4, 100), tokens)
    assert len(loads) == 2
    assert loads.max(axis=1).sum() <= 141


def test_examples_above_the_budget_share_a_micro_batch() -> None:
    """In two micro-batches their ranks would wait for each other."""
    tokens = [300, 280, 290, *[20] * 60]
    plan = plan_micro_batches(sizes(tokens), 4, 100)
    assert sum(max(tokens[index] for index in chain.from_iterable(ranks)) > 100 for ranks in plan) == 1


@given(pair_shapes, st.integers(1, 12), st.booleans())
def test_layers_with_windows_or_chunks_attend_to_fewer_keys(
    shapes: list[tuple[int, ...]], size: int, in_chunks: bool
) -> None:
    prompts, responses = [shape[0] for shape in shapes], [shape[1:] for shape in shapes]

    def attended(*reaches: Reach) -> list[int]:
        found = example_sizes(
            np.array(prompts),
            np.array(list(chain.from_iterable(responses))),
            np.array([len(of_pair) for of_pair in responses]),
            ComputeCosts(0.0, 0.0, reaches=reaches),
        )
        return [int(count) for count in found.attended]

    def keys(position: int) -> int:
        return position % size + 1 if in_chunks else min(position + 1, size)

    expected = [
        sum(map(keys, range(prompt)))
        + sum(keys(place) for response in own for place in range(prompt, prompt + response - 1))
        for prompt, own in zip(prompts, responses, strict=True)
    ]
    assert attended(Reach(size, 1.0, in_chunks)) == expected
    half = [(full + limited) / 2 for full, limited in zip(attended(), expected, strict=True)]
    assert np.abs(np.array(attended(Reach(size, 0.5, in_chunks))) - half).max() <= 0.5
