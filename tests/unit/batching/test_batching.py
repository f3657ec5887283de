"""The batch of a step: sampled, planned over ranks (balanced, within the budget), packed without padding."""

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import chain
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.costs import Arrangement, ComputeCosts, ExampleSizes
from dpo_dist.batching.pack import dummy_batch, pack, padded_rows
from dpo_dist.batching.plan import consecutive_batches, plan_micro_batches
from dpo_dist.batching.sampler import BatchSampler, SourceSpan, make_sampler
from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import TrainerConfig
from dpo_dist.data.example import Example
from dpo_dist.foundation.errors import ConfigError
from tests.support.packing import dataset_of, pack_unkeyed, packed_tokens, pair_shapes, random_pairs

Plan = list[list[list[int]]]
Shapes = list[tuple[int, ...]]
PACKED, PADDED, SINGLE = Arrangement
SINGLE_COSTS, PADDED_COSTS = ComputeCosts(0.001, 0.1, SINGLE), ComputeCosts(0.001, 0.1, PADDED)


def sizes(tokens: list[int], costs: list[float] | None = None) -> ExampleSizes:
    counts = np.array(tokens, dtype=np.int64)
    times = np.array(costs or tokens, dtype=np.float64)
    return ExampleSizes(counts, counts, counts, counts, counts, times, counts, counts)


def sizes_of(shapes: Shapes, costs: ComputeCosts) -> ExampleSizes:
    data, every = dataset_of(random_pairs(shapes)), np.arange(len(shapes))
    return data.sizes(every, data.response_indices(every), data.response_counts(every), costs)


def loads_of(plan: Plan, costs: list[float] | list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.array([[sum(costs[index] for index in indices) for indices in ranks] for ranks in plan])


def check_is_whole(plan: Plan, examples: int, world_size: int) -> None:
    assert sorted(chain.from_iterable(chain.from_iterable(plan))) == list(range(examples))
    assert {len(ranks) for ranks in plan} == {world_size}


# Few long pairs and many short ones, and attention that makes long ones dearer.
pairs = st.lists(st.tuples(st.integers(1, 60), st.floats(1, 3)), min_size=1, max_size=200)


@given(pairs, st.integers(1, 9), st.integers(1, 300))
def test_every_example_once_within_the_budget(
    pairs: list[tuple[int, float]], world_size: int, budget: int
) -> None:
    tokens = [length for length, _ in pairs]
    of = sizes(tokens, [length * slowness for length, slowness in pairs])
    plan = plan_micro_batches(of, world_size, budget, SINGLE_COSTS)
    check_is_whole(plan, len(tokens), world_size)
    for indices in chain.from_iterable(plan):
        assert sum(tokens[index] for index in indices) <= budget or len(indices) == 1
    # No round in which every rank would compute a dummy.
    assert all(any(ranks) for ranks in plan)
    assert plan == plan_micro_batches(of, world_size, budget, SINGLE_COSTS)


@pytest.mark.parametrize(("tokens", "expected"), [([30] * 4, 1), ([30, 30, 30, 31], 2), ([100] * 3, 2)])
def test_no_needless_micro_batches(tokens: list[int], expected: int) -> None:
    assert len(plan_micro_batches(sizes(tokens), 2, 60, SINGLE_COSTS)) == expected


@pytest.mark.parametrize(("budget", "micro_batches"), [(8192, 2), (13_000, 1)])
@pytest.mark.parametrize("world_size", [8, 64])
def test_ranks_get_equal_costs(world_size: int, budget: int, micro_batches: int) -> None:
    tokens = np.random.default_rng(0).integers(50, 800, 28 * world_size).tolist()
    costs = [t + t * t / 4_000 for t in tokens]
    plan = plan_micro_batches(sizes(tokens, costs), world_size, budget, SINGLE_COSTS)
    assert len(plan) == micro_batches
    loads = loads_of(plan, costs)
    assert loads.max(axis=1).sum() < 1.03 * loads.mean() * micro_batches
    assert loads.sum(axis=0).max() < 1.02 * loads.sum(axis=0).mean()


def test_the_rank_with_the_least_work_gets_the_costliest_micro_batch() -> None:
    costs = [10, 8, 6, 4]  # each fills a micro-batch of a rank
    loads = loads_of(plan_micro_batches(sizes(costs), 2, 10, SINGLE_COSTS), costs)
    assert loads.sum(axis=0).tolist() == [14, 14]


def test_beside_one_costly_example_the_other_ranks_get_more() -> None:
    """Balancing pairs of cost 1 at 70 in both micro-batches would make all ranks wait for the pair of 100."""
    tokens = [100] + [1] * (4 * 140 - 100)
    loads = loads_of(plan_micro_batches(sizes(tokens), 4, 100, SINGLE_COSTS), tokens)
    assert len(loads) == 2
    assert loads.max(axis=1).sum() <= 141


@given(pair_shapes)
def test_sizes_are_packed_tokens_with_costs_of_keys_and_targets(shapes: Shapes) -> None:
    laid_out = [packed_tokens(prompt, lengths) for prompt, *lengths in shapes]
    of = sizes_of(shapes, ComputeCosts(key=0, target=0))
    assert of.tokens.tolist() == of.costs.tolist() == laid_out
    unshared = [sum(prompt + tokens - 1 for tokens in lengths) for prompt, *lengths in shapes]
    assert of.unshared_tokens.tolist() == unshared
    heads = sizes_of(shapes, ComputeCosts(key=0, target=1)).costs - laid_out
    assert heads.tolist() == [sum(lengths) for _, *lengths in shapes]
    keys = sizes_of(shapes, ComputeCosts(key=1, target=0)).costs - laid_out
    # Token n of a sequence sees n keys; half of that square is what a causal kernel computes.
    assert keys.tolist() == [
        prompt**2 / 2 + sum((n - 1) * (prompt + (n - 1) / 2) for n in lengths) for prompt, *lengths in shapes
    ]


@given(pair_shapes)
def test_sizes_without_shared_prompts_are_those_of_the_rows(shapes: Shapes) -> None:
    for costs in (SINGLE_COSTS, PADDED_COSTS):
        of = sizes_of(shapes, costs)
        for place, pair in enumerate(random_pairs(shapes)):
            lengths = np.array(padded_rows(pack_unkeyed([pair]), 0).lengths)
            assert of.tokens[place] == of.unshared_tokens[place] == lengths.sum()
            assert of.attended[place] == (lengths * (lengths + 1) // 2).sum()
            if costs is PADDED_COSTS:
                assert (of.responses[place], of.longest[place]) == (len(lengths), lengths.max())


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(50, 2000),
)
def test_padded_rows_fit_the_budget(shapes: list[tuple[int, int, int]], world_size: int, budget: int) -> None:
    of = sizes_of([*shapes], PADDED_COSTS)
    plan = plan_micro_batches(of, world_size, budget, PADDED_COSTS)
    check_is_whole(plan, len(shapes), world_size)
    for own in chain.from_iterable(plan):
        cells = 2 * len(own) * int(of.longest[own].max()) if own else 0
        assert cells <= budget or len(own) == 1
    assert plan == plan_micro_batches(of, world_size, budget, PADDED_COSTS)


def test_short_and_long_rows_are_not_padded_to_one_length() -> None:
    of = sizes_of([(3000, 200, 100)] + 30 * [(50, 20, 20)], PADDED_COSTS)
    plan = [own for own in chain.from_iterable(plan_micro_batches(of, 1, 10**6, PADDED_COSTS)) if own]
    computed = sum(2 * len(own) * int(of.longest[own].max()) for own in plan)
    assert computed == 2 * of.longest.sum()


def test_few_tokens_are_one_micro_batch_whatever_is_padded() -> None:
    of = sizes_of([(5, length, length) for length in range(1, 30)], PADDED_COSTS)
    assert len(plan_micro_batches(of, 1, 10**6, PADDED_COSTS)) == 1


@pytest.mark.parametrize("kind", [LossKind.plackett_luce, LossKind.sft])
def test_each_micro_batch_knows_the_most_responses_of_a_rank(kind: LossKind) -> None:
    data = dataset_of(random_pairs([(5, 2, 3), (30, 9, 8, 7), (4, 6), (3, 2, 2)]))
    plans = [
        shard_batch(data, np.arange(4), rank, 3, 40, SINGLE_COSTS, LossConfig(kind)) for rank in range(3)
    ]
    for of_ranks in zip(*[list(plan.batches()) for plan in plans], strict=True):
        most = max(len(batch.response_tokens) for batch in of_ranks)
        assert {batch.forwards for batch in of_ranks} == {max(2, most)}


@pytest.mark.parametrize(
    ("arrangement", "budget", "ends"),
    [(PACKED, 100, [3]), (PACKED, 15, [2, 3]), (PADDED, 21, [2, 3]), (SINGLE, 18, [2, 3])],
)
def test_micro_batches_keep_the_budget(arrangement: Arrangement, budget: int, ends: list[int]) -> None:
    batches = consecutive_batches([(3, 2, 4), (1, 5), (2, 1, 1)], budget, arrangement)
    assert batches == [range(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


def ids(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(numbers, dtype=np.int32)


def test_layout_by_hand() -> None:
    keys = np.arange(8, dtype=np.uint64).reshape(4, 2)
    batch = pack(
        [
            Example(ids(1, 2, 3), (ids(4, 5), ids(6, 7, 8))),
            Example(ids(9), (ids(10), ids(11, 12))),
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


def test_a_dummy_has_weight_0() -> None:
    batch = dummy_batch()
    assert batch.weights.tolist() == [0]
    assert len(batch.keys) == 0
    assert batch.tokens == 0
    assert len(batch.targets) == int(batch.response_tokens.sum()) == 2
    assert len(batch.input_ids) == 2  # weights of states that go to the next token have a gradient


PAD = 1  # no token of `random_pairs`


@given(pair_shapes, st.booleans(), st.randoms(use_true_random=False))
def test_each_row_has_one_response(shapes: list[tuple[int, ...]], is_masked: bool, random: Random) -> None:
    pairs = random_pairs(shapes)
    if is_masked:
        masks = [tuple(np.array([random.random() < 0.6 for _ in r]) for r in one.responses) for one in pairs]
        pairs = [replace(one, trained=own) for one, own in zip(pairs, masks, strict=True)]
    batch = pack_unkeyed(pairs)
    rows = padded_rows(batch, PAD)
    longest = rows.input_ids.shape[1]
    expected, predicted_at, row = [], [], 0
    for pair in pairs:
        for which, response in enumerate(pair.responses):
            inputs = np.concatenate((pair.prompt_ids, response[:-1]))
            np.testing.assert_array_equal(rows.input_ids[row, : len(inputs)], inputs)
            assert (rows.input_ids[row, len(inputs) :] == PAD).all()
            assert rows.lengths[row] == len(inputs) == rows.is_token[row].sum()
            assert rows.is_token[row, : len(inputs)].all()
            mask = pair.masks[which]
            predicted_at += (row * longest + len(pair.prompt_ids) - 1 + np.flatnonzero(mask)).tolist()
            expected += response[mask].tolist()
            row += 1
    assert (longest, len(rows.input_ids)) == (max(rows.lengths), row)
    assert rows.predictors.tolist() == predicted_at
    assert batch.targets.tolist() == expected


# The batch of a step is a function of seed, data and batch size, and of nothing else.
def sampler(pairs: int | list[SourceSpan], batch: int, **trainer: float) -> BatchSampler:
    spans = [SourceSpan(0, pairs, 1.0)] if isinstance(pairs, int) else pairs
    return make_sampler(spans, TrainerConfig(global_batch_pairs=batch, **trainer))


def visited(of: BatchSampler) -> list[int]:
    return [row for step in range(of.steps) for row in of.indices(step).tolist()]


@given(st.integers(1, 60), st.integers(1, 25), st.integers(1, 4))
def test_epochs_follow_without_a_gap_in_a_new_order(pairs: int, batch: int, epochs: int) -> None:
    whole = sampler(pairs, batch, epochs=epochs)
    order = visited(whole)
    parts = [order[start : start + pairs] for start in range(0, len(order), pairs)]
    assert [sorted(part) for part in parts] == [list(range(pairs))] * epochs
    assert pairs < 10 or len({tuple(part) for part in parts}) == epochs
    # All batches but the last are full.
    assert all(len(whole.indices(step)) == batch for step in range(whole.steps - 1))
    assert 0 < len(whole.indices(whole.steps - 1)) <= batch


MIXED = [(0, 70_001, 1.0), (70_001, 70_101, 2.5), (70_101, 100_000, 0.3)]


@pytest.mark.parametrize(
    ("spans", "seed", "first", "digest"),
    [
        ([(0, 100_003, 1.0)], 0, [76282, 3931, 71717, 94077], "ac2085d1dc0c0973"),
        (MIXED, 42, [22346, 34202, 10185, 16846], "e1acf27d1f9fc957"),
        ([(0, 30_000, 0.01)], 1, [26417, 26703, 7556, 3478], "498f3bfaaafe44e8"),
    ],
    ids=["whole", "mixed", "few"],
)
def test_the_order_of_many_pairs_is_the_recorded_one(
    spans: list[tuple[int, int, float]], seed: int, first: list[int], digest: str
) -> None:
    """numpy guarantees no order across versions, and uses other algorithms for large numbers and samples."""
    order = np.array(visited(sampler([SourceSpan(*span) for span in spans], 4096, seed=seed, epochs=2.0)))
    assert order[:4].tolist() == first
    assert hashlib.blake2b(order.astype("<i8").tobytes(), digest_size=8).hexdigest() == digest


@pytest.mark.parametrize(
    ("weight", "counts"),
    [(1.0, {1: 10}), (2.0, {2: 10}), (0.5, {1: 5}), (1.3, {1: 7, 2: 3}), (0.1, {1: 1})],
)
def test_weights_are_draws_per_epoch(weight: float, counts: dict[int, int]) -> None:
    order = visited(sampler([SourceSpan(0, 10, weight), SourceSpan(10, 14, 1.0)], 3))
    seen = Counter(row for row in order if row < 10)
    assert Counter(seen.values()) == counts
    assert sorted(row for row in order if row >= 10) == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("epochs", "total", "steps"), [(1.0, 10, 3), (0.5, 5, 2), (1.5, 15, 4), (2.0, 20, 5), (0.25, 2, 1)]
)
def test_epochs_may_be_fractions(epochs: float, total: int, steps: int) -> None:
    part = sampler(10, 4, epochs=epochs)
    assert (part.total_pairs, part.steps, len(visited(part))) == (total, steps, total)


def test_the_epoch_of_a_step_is_the_share_of_pairs_that_it_has_seen() -> None:
    of = sampler(10, 4, epochs=2.0)
    assert [of.epoch(step) for step in (-1, 0, 1, 4)] == [0, 0.4, 0.8, 2]
    assert sampler(10, 4).epoch(2) == 1, "the last step has two pairs"


def test_what_is_visited_is_known_without_a_look_at_all_epochs() -> None:
    assert sampler(10, 4, epochs=1e9).visited_indices().tolist() == [*range(10)]


def test_a_weight_that_draws_no_example_is_refused() -> None:
    with pytest.raises(ConfigError, match="no pair of a source would be drawn") as raised:
        sampler([SourceSpan(0, 100, 1.0), SourceSpan(100, 110, 0.04)], 4)
    assert raised.value.where == "data.train[1].weight"


def test_a_source_that_is_held_out_as_a_whole_changes_no_order() -> None:
    """`open_dataset` refuses sources of which nothing is kept for another reason."""
    trained = [SourceSpan(0, 4, 1.0), SourceSpan(4, 5, 2.0)]
    with_empty = sampler([SourceSpan(0, 0, 1.0), trained[0], SourceSpan(4, 4, 0.5), trained[1]], 2, epochs=3)
    assert visited(with_empty) == visited(sampler(trained, 2, epochs=3))
