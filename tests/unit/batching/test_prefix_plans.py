"""Examples that begin alike are planned into one micro-batch: whole, within the budget, never slower."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.costs import ComputeCosts, causal_pairs
from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.plan import deal_out
from dpo_dist.batching.prefixes import input_rows
from dpo_dist.batching.step_batch import RankBatch, shard_batch
from dpo_dist.data.example import Example
from tests.support.packing import SHARING, dataset_of, random_pairs

Shapes = list[tuple[int, ...]]


def tree_of(shapes: Shapes, seed: int) -> list[Example]:
    """Pairs whose prompts begin like earlier ones, with or without their first response, to any depth.

    No two responses begin alike: what responses share is found when they are packed, not before.
    """
    generator, found = np.random.default_rng(seed), list[Example]()
    for number, pair in enumerate(random_pairs(shapes, seed)):
        prompt, responses = pair.prompt_ids, [ids.copy() for ids in pair.responses]
        if found and generator.integers(4):
            like = input_rows(found[generator.integers(number)])[0][: generator.integers(len(prompt) + 1)]
            prompt = np.concatenate((like, prompt[len(like) :]))
        for place, ids in enumerate(responses):
            ids[0] = 1000 + 10 * number + place
        found.append(Example(prompt, tuple(responses)))
    return found


def shares_of(pairs: list[Example], ranks: int, budget: int, costs: ComputeCosts) -> list[RankBatch]:
    data = dataset_of(pairs)
    return [shard_batch(data, np.arange(len(pairs)), rank, ranks, budget, costs) for rank in range(ranks)]


def first_shares(batch: PackedBatch) -> dict[int, int]:
    """Tokens that each example with more than its prompt shared does not compute again."""
    owners = np.repeat(range(len(batch.layout)), [len(pieces) - 1 for pieces in batch.layout])
    found: dict[int, int] = {}
    for row, shared, _ in batch.segments:
        found.setdefault(int(owners[row]), shared)
    return found


def seconds(shares: list[RankBatch]) -> int:
    """Time of a step whose tokens cost 1, and another example's shared tokens 4, by the slowest ranks."""
    costs = [
        [batch.tokens + 4 * np.count_nonzero([*first_shares(batch).values()]) for batch in share.batches()]
        for share in shares
    ]
    return int(np.max(costs, axis=0).sum())


shapes = st.lists(
    st.tuples(st.integers(5, 60), st.lists(st.integers(1, 12), min_size=1, max_size=3)).map(
        lambda pair: (pair[0], *pair[1])
    ),
    min_size=1,
    max_size=24,
)


@given(
    st.builds(tree_of, shapes, st.integers(0, 999)),
    st.integers(1, 4),
    st.integers(20, 400),
    st.sampled_from([0.0, 0.1]),
)
def test_any_tree_is_planned_whole_within_the_budget_and_never_slower(
    pairs: list[Example], ranks: int, budget: int, copy_memory: float
) -> None:
    costs = replace(SHARING, copy_memory=copy_memory)
    shares, plain = (
        shares_of(pairs, ranks, budget, own) for own in (costs, replace(costs, beyond_prompts=False))
    )
    every = [index for share in shares for index in chain.from_iterable(share.micro_batches)]
    assert sorted(every) == list(range(len(pairs)))
    assert len({len(share.micro_batches) for share in shares}) == 1
    assert len(shares[0].micro_batches) <= len(plain[0].micro_batches)
    assert seconds(shares) <= seconds(plain)
    batches = [batch for share in shares for batch in share.batches() if len(batch.keys)]
    assert all(batch.tokens <= budget or len(batch.layout) == 1 for batch in batches)
    segments = np.array([segment for batch in batches for segment in batch.segments])
    for share in shares:
        assert share.computed_tokens == sum(batch.tokens for batch in batches)
        assert (
            share.attended == (causal_pairs(segments[:, 1:].sum(axis=1)) - causal_pairs(segments[:, 1])).sum()
        )
        assert share.tokens == plain[0].tokens == plain[0].computed_tokens
        assert share.unshared_tokens == plain[0].unshared_tokens
        assert share.targets == plain[0].targets


def agents(tools: int, pairs: int, tokens: int = 1500, longest: int = 41) -> list[Example]:
    """Pairs after one of several definitions of tools each; of 100 other tokens if responses are short."""
    of_tools = [pair.prompt_ids for pair in random_pairs([(tokens, 1)] * tools)]
    lengths = np.random.default_rng(0).integers(41, longest + 1, (pairs, 2))
    return [
        Example(np.concatenate((of_tools[number % tools], pair.prompt_ids)), pair.responses)
        for number, pair in enumerate(random_pairs([(20, *map(int, own)) for own in lengths], seed=1))
    ]


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("tools", [1, 8])
def test_a_definition_of_tools_is_computed_once_in_each_micro_batch(tools: int, ranks: int) -> None:
    shares = shares_of(agents(tools, 64), ranks, 8192, SHARING)
    assert shares[0].computed_tokens == pytest.approx(64 * 100 + max(tools, ranks) * 1500, rel=0.01)
    assert shares[0].tokens == 64 * 1600
    work = [sum(batch.tokens for batch in share.batches()) for share in shares]
    assert max(work) <= 1.01 * np.mean(work)


@pytest.mark.parametrize(
    ("tools", "tokens", "budget", "slowest"), [(1, 1500, 4096, 1.02), (32, 300, 8192, 1.03)]
)
def test_ranks_get_equal_work_of_examples_that_begin_alike(
    tools: int, tokens: int, budget: int, slowest: float
) -> None:
    shares = shares_of(agents(tools, 64, tokens, longest=400), 8, budget, SHARING)
    work = np.array([[batch.tokens for batch in share.batches()] for share in shares])
    assert work.max(axis=0).sum() <= slowest * work.sum() / 8


def test_a_budget_cuts_examples_that_begin_alike() -> None:
    (share,) = shares_of(agents(2, 64), 1, 2400, SHARING)
    assert share.computed_tokens == pytest.approx(64 * 100 + 8 * 1500, rel=0.01)


@pytest.mark.parametrize("seed", [26, 32, 49])
def test_no_more_micro_batches_than_without_prefixes(seed: int) -> None:
    """More of them may share more, but each waits for the slowest rank, and starts the model anew."""
    generator = np.random.default_rng(seed)
    shapes = [tuple(map(int, generator.integers([6, 1, 1], [65, 30, 30]))) for _ in range(12)]
    known, unknown = (
        len(shares_of(tree_of(shapes, seed), 1, 150, replace(SHARING, beyond_prompts=on))[0].micro_batches)
        for on in (True, False)
    )
    assert known <= unknown


@pytest.mark.parametrize(
    ("sizes", "ranks", "budget"),
    [
        ([(0, 166, 73), (116, 181, 57), (139, 211, 72), (166, 223, 118)], 2, 564),
        # The last one, beside the first one alone, shares nothing, though each one shares much with its like.
        (
            [
                (0, 166, 73),
                (150, 300, 100),
                (300, 600, 100),
                (600, 1200, 100),
                (650, 1150, 100),
                (1100, 1900, 100),
            ],
            1,
            2100,
        ),
    ],
)
def test_examples_that_do_not_pay_to_share_keep_the_budget(
    sizes: list[tuple[int, int, int]], ranks: int, budget: int
) -> None:
    """Where a row that shares tokens is slow, a long one shares none of its first with another example."""
    pairs, like = list[Example](), np.empty(0, dtype=np.int32)
    for number, (common, prompt, response) in enumerate(sizes):
        like = np.concatenate((like[:common], np.full(prompt - common, 100 + number, dtype=np.int32)))
        pairs.append(Example(like, (np.full(response, number, dtype=np.int32),)))
    shares = shares_of(pairs, ranks, budget, replace(SHARING, key=0.05, is_masked=True))
    batches = [batch for share in shares for batch in share.batches()]
    assert all(batch.tokens <= budget or len(batch.layout) == 1 for batch in batches)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tools", [1, 5])
def test_ranks_are_dealt_examples_that_begin_alike_of_equal_cost(tools: int, ranks: int) -> None:
    data, every = dataset_of(agents(tools, 200)), np.arange(200)
    sizes = data.sizes(every, data.response_indices(every), data.response_counts(every), SHARING)
    dealt = deal_out(sizes, SHARING, ranks)
    assert sorted(chain.from_iterable(dealt)) == every.tolist()
    work = [200 / ranks * 100 + tools / ranks * 1500] * ranks
    assert [len(own) * 100 + len({*(own % tools)}) * 1500 for own in dealt] == pytest.approx(work, abs=1600)
    assert sum(len({*(own % tools)}) for own in dealt) < tools + ranks


@pytest.mark.parametrize(("copy_memory", "most"), [(0.0, 10), (0.1, 4)])
def test_copies_of_shared_keys_take_memory(copy_memory: float, most: int) -> None:
    """Both responses of a pair have copies: of 1,000 tokens they take as much as 200 tokens."""
    (share,) = shares_of(agents(1, 40, 1000), 1, 2020, replace(SHARING, copy_memory=copy_memory))
    assert max(map(len, share.micro_batches)) == most


@pytest.mark.parametrize("ranks", [1, 3])
def test_pairs_that_share_nothing_are_planned_as_without_prefixes(ranks: int) -> None:
    pairs = random_pairs([(5 + 7 * n % 90, 3 + n % 11, 30 - n % 17) for n in range(100)])
    shares, plain = (
        [share.positions for share in shares_of(pairs, ranks, 500, replace(SHARING, beyond_prompts=known))]
        for known in (True, False)
    )
    assert shares == plain
