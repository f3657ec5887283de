"""The batch of a step is a function of seed, data and batch size, and of nothing else."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.sampler import BatchSampler, Span, make_sampler
from dpo_dist.config.schema import TrainerConfig
from dpo_dist.foundation.errors import ConfigError


def sampler(pairs: int | list[Span], batch: int, **trainer: float) -> BatchSampler:
    spans = [Span(0, pairs, 1.0)] if isinstance(pairs, int) else pairs
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
    order = np.array(visited(sampler([Span(*span) for span in spans], 4096, seed=seed, epochs=2.0)))
    assert order[:4].tolist() == first
    assert hashlib.blake2b(order.astype("<i8").tobytes(), digest_size=8).hexdigest() == digest


@pytest.mark.parametrize(
    ("weight", "counts"),
    [(1.0, {1: 10}), (2.0, {2: 10}), (0.5, {1: 5}), (1.3, {1: 7, 2: 3}), (0.1, {1: 1})],
)
def test_weights_are_draws_per_epoch(weight: float, counts: dict[int, int]) -> None:
    order = visited(sampler([Span(0, 10, weight), Span(10, 14, 1.0)], 3))
    seen = Counter(row for row in order if row < 10)
    assert Counter(seen.values()) == counts
    assert sorted(row for row in order if row >= 10) == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("epochs", "total", "steps"), [(1.0, 10, 3), (0.5, 5, 2), (1.5, 15, 4), (2.0, 20, 5), (0.25, 2, 1)]
)
def test_epochs_may_be_fractions(epochs: float, total: int, steps: int) -> None:
    part = sampler(10, 4, epochs=epochs)
    assert (part.total_pairs, part.steps, len(visited(part))) == (total, steps, total)


def test_a_weight_that_draws_no_example_is_refused() -> None:
    with pytest.raises(ConfigError, match="no pair of a source would be drawn") as raised:
        sampler([Span(0, 100, 1.0), Span(100, 110, 0.04)], 4)
    assert raised.value.where == "data.train[1].weight"


def test_a_source_that_is_held_out_as_a_whole_changes_no_order() -> None:
    """`open_dataset` refuses sources of which nothing is kept for another reason."""
    trained = [Span(0, 4, 1.0), Span(4, 5, 2.0)]
    with_empty = sampler([Span(0, 0, 1.0), trained[0], Span(4, 4, 0.5), trained[1]], 2, epochs=3)
    assert visited(with_empty) == visited(sampler(trained, 2, epochs=3))
