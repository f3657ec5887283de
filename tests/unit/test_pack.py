"""How pairs lie in a micro-batch, and who computes which."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.data.pack import (
    PairSizes,
    Sequences,
    dummy_batch,
    pack,
    packed_tokens,
    pair_sizes,
    plan_micro_batches,
)
from tests.support.packing import pack_unkeyed, random_pairs

shapes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=3)).map(
        lambda pair: (pair[0], *pair[1])
    ),
    min_size=1,
    max_size=5,
)


def ids(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(numbers, dtype=np.int32)


def test_layout_by_hand() -> None:
    keys = np.arange(8, dtype=np.uint64).reshape(4, 2)
    batch = pack(
        [
            Sequences(ids(1, 2, 3), (ids(4, 5), ids(6, 7, 8))),
            Sequences(ids(9), (ids(10), ids(11, 12))),
        ],
        keys,
    )
    # No response's last token is laid out: it predicts nothing.
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 6, 7, 9, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 0, 1]
    assert batch.layout == ((3, 1, 2), (1, 0, 1))
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 10, 11, 12]
    assert batch.predictors.tolist() == [2, 3, 2, 4, 5, 6, 6, 7]
    assert batch.response_tokens.tolist() == [2, 3, 1, 2]
    assert batch.keys is keys
    assert batch.weights.tolist() == [1, 1]
    assert batch.tokens == 8
    assert {tensor.dtype for tensor in (batch.input_ids, batch.targets, batch.predictors)} == {torch.int64}


@given(shapes)
def test_every_target_is_predicted_by_the_token_before_it(shapes: list[tuple[int, ...]]) -> None:
    pairs = random_pairs(shapes)
    batch = pack_unkeyed(pairs)
    before = [
        (int(token), place)
        for pair in pairs
        for response in pair.responses
        for place, token in enumerate([*pair.prompt_ids, *response][:-1])
        if place >= len(pair.prompt_ids) - 1
    ]
    places = batch.predictors
    predicting = zip(batch.input_ids[places].tolist(), batch.position_ids[places].tolist(), strict=True)
    assert list(predicting) == before
    assert batch.targets.tolist() == [t for p in pairs for r in p.responses for t in r.tolist()]
    assert sum(map(sum, batch.layout)) == len(batch.input_ids) == batch.tokens
    assert batch.tokens == sum(packed_tokens(prompt, responses) for prompt, *responses in shapes)


def test_a_dummy_takes_part_and_weighs_nothing() -> None:
    batch = dummy_batch()
    assert batch.weights.tolist() == [0]
    assert len(batch.keys) == 0
    assert batch.tokens == 0
    assert len(batch.targets) == int(batch.response_tokens.sum()) == 2
    assert len(batch.input_ids) == 1


def test_a_batch_moves_to_a_device_whole() -> None:
    batch = pack_unkeyed(random_pairs([(3, 2, 4)])).to(torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def sizes(tokens: list[int], costs: list[float] | None = None) -> PairSizes:
    return PairSizes(np.array(tokens, dtype=np.int64), np.array(costs or tokens, dtype=np.float64))


plans = st.tuples(
    st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 80)
)


@given(plans)
def test_every_pair_is_computed_once_within_the_budget(plan: tuple[list[int], int, int]) -> None:
    tokens, world_size, budget = plan
    micro_batches = plan_micro_batches(sizes(tokens), world_size, budget)
    bins = list(chain.from_iterable(micro_batches))
    assert sorted(chain.from_iterable(bins)) == list(range(len(tokens)))
    assert {len(ranks) for ranks in micro_batches} == {world_size}
    for places in bins:
        assert sum(tokens[place] for place in places) <= budget or len(places) == 1
    # No round in which every rank would compute a dummy.
    assert all(any(ranks) for ranks in micro_batches)
    assert micro_batches == plan_micro_batches(sizes(tokens), world_size, budget)


def test_nothing_is_planned_for_no_pairs() -> None:
    assert plan_micro_batches(sizes([]), 4, 100) == []


@pytest.mark.parametrize(
    ("tokens", "world_size", "budget", "expected"),
    [
        ([30, 30, 30, 30], 2, 60, 1),
        ([30, 30, 30, 31], 2, 60, 2),
        ([5], 4, 60, 1),
        ([100, 5, 5], 1, 60, 2),
        ([100, 100, 100], 2, 60, 2),
        ([60] * 8, 4, 60, 2),
    ],
)
def test_micro_batches_are_no_more_than_needed(
    tokens: list[int], world_size: int, budget: int, expected: int
) -> None:
    assert len(plan_micro_batches(sizes(tokens), world_size, budget)) == expected


@given(shapes)
def test_sizes_are_tokens_laid_out_and_what_attention_adds(shapes: list[tuple[int, ...]]) -> None:
    prompts = np.array([prompt for prompt, *_ in shapes])
    responses = np.array([tokens for _, *lengths in shapes for tokens in lengths])
    of = pair_sizes(prompts, responses, np.array([len(lengths) for _, *lengths in shapes]))
    assert of.tokens.tolist() == [packed_tokens(prompt, lengths) for prompt, *lengths in shapes]
    assert (of.costs > of.tokens).all()


def test_attention_costs_as_much_as_all_else_in_very_long_sequences_only() -> None:
    one = np.array([1])
    short, long, double = (pair_sizes(np.array([n]), one, one).costs[0] / n for n in (512, 32_768, 65_536))
    assert short == pytest.approx(1, abs=0.02)
    assert long == pytest.approx(2)
    assert double == pytest.approx(3)


@pytest.mark.parametrize(("budget", "micro_batches"), [(8192, 2), (13_000, 1)])
@pytest.mark.parametrize("world_size", [8, 64])
def test_ranks_are_loaded_alike(world_size: int, budget: int, micro_batches: int) -> None:
    tokens = np.random.default_rng(0).integers(50, 800, 28 * world_size).tolist()
    costs = [t + t * t / 4_000 for t in tokens]
    plan = plan_micro_batches(sizes(tokens, costs), world_size, budget)
    assert len(plan) == micro_batches
    loads = np.array([[sum(costs[place] for place in places) for places in ranks] for ranks in plan])
    assert loads.max(axis=1).sum() < 1.03 * loads.mean() * micro_batches
    assert loads.sum(axis=0).max() < 1.02 * loads.sum(axis=0).mean()


@pytest.mark.parametrize("world_size", [1, 8, 64])
def test_a_budget_that_the_pairs_all_but_fill_takes_no_micro_batch_more(world_size: int) -> None:
    tokens = np.random.default_rng(0).integers(50, 800, 40 * world_size).tolist()
    for filled in (0.9, 0.95, 0.98):
        budget = round(sum(tokens) / world_size / 2 / filled)
        assert len(plan_micro_batches(sizes(tokens), world_size, budget)) == 2, filled


def test_ranks_wait_little_where_few_pairs_fill_the_budget() -> None:
    tokens = np.random.default_rng(0).integers(20, 500, (16 * 8, 3)).sum(axis=1).tolist()
    plan = plan_micro_batches(sizes(tokens), 8, 2048)
    loads = np.array([[sum(tokens[place] for place in places) for places in ranks] for ranks in plan])
    assert len(plan) == -(-sum(tokens) // (8 * 2048))
    assert loads.max() <= 2048
    assert loads.max(axis=1).sum() < 1.03 * loads.mean() * len(plan)
    assert loads.sum(axis=0).max() < 1.01 * loads.sum(axis=0).mean()


def test_pairs_above_the_budget_leave_the_others_within_it() -> None:
    long = [182, 132, 119, 111, 176, 145, 76, 163, 140, 88, 122, 124, 199, 178, 151]
    tokens = [*long, 35, 29, 10, 49, 7, 20, 28, 5, 59, 8, 45]
    bins = list(chain.from_iterable(plan_micro_batches(sizes(tokens), 2, 60)))
    assert sorted(chain.from_iterable(bins)) == list(range(len(tokens)))
    assert all(len(places) == 1 or sum(tokens[place] for place in places) <= 60 for places in bins)
    assert len(bins) == 20
