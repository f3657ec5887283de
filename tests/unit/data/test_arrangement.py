"""Tokens that each arrangement computes, and micro-batches of consecutive examples within a budget."""

import pytest

from dpo_dist.batching.plan import Arrangement, computed_tokens, consecutive_batches

PACKED, PADDED, SINGLE = Arrangement
LAYOUT = [(3, 2, 4), (1, 5), (2, 1, 1)]


@pytest.mark.parametrize(
    ("arrangement", "tokens"),
    [(PACKED, 3 + 2 + 4 + 1 + 5 + 2 + 1 + 1), (PADDED, 5 * 7), (SINGLE, 5 + 7 + 6 + 3 + 3)],
)
def test_computed_tokens_by_hand(arrangement: Arrangement, tokens: int) -> None:
    assert computed_tokens(LAYOUT, arrangement) == tokens


@pytest.mark.parametrize(
    ("arrangement", "budget", "batches"),
    [
        (PACKED, 100, [range(3)]),
        (PACKED, 15, [range(2), range(2, 3)]),
        (PADDED, 21, [range(2), range(2, 3)]),
        (PADDED, 20, [range(1), range(1, 3)]),
        (SINGLE, 18, [range(2), range(2, 3)]),
        (PADDED, 1, [range(1), range(1, 2), range(2, 3)]),
    ],
)
def test_a_micro_batch_computes_tokens_within_the_budget(
    arrangement: Arrangement, budget: int, batches: list[range]
) -> None:
    assert consecutive_batches(LAYOUT, budget, arrangement) == batches
