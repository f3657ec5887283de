"""A micro-batch whose rows begin alike computes what rows on their own do, each shared token once."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.pack import padded_rows
from dpo_dist.batching.prefixes import common_tokens, input_rows
from dpo_dist.data.example import Example
from tests.support.packing import (
    branching,
    pack_unkeyed,
    packed_tokens,
    plain_logps,
    random_pairs,
)
from tests.unit.model.test_architectures import assert_same, gradients, packed, shapes, windowed

pytestmark = pytest.mark.slow

KINDS = ("qwen2", "gemma2", "gpt_oss", "mixtral", "llama4_text")
forests = st.builds(
    lambda lengths, seed: branching(random_pairs(lengths, seed), seed), shapes, st.integers(0, 99)
)


@lru_cache
def model_of(kind: str) -> Any:
    return windowed(kind, 5 if kind not in ("qwen2", "mixtral") else None)


@settings(max_examples=80)
@given(forests, st.sampled_from(KINDS))
def test_any_forest_has_the_log_probs_and_gradients_of_rows(pairs: list[Example], kind: str) -> None:
    causal_lm = model_of(kind)
    expected = plain_logps(causal_lm, pairs)
    expected_gradients = gradients(causal_lm, expected)
    own_attention = causal_lm.config._attn_implementation
    logps = packed(causal_lm)(pack_unkeyed(pairs))
    assert (logps - expected).norm() <= 1e-6 * expected.norm()
    assert_same(gradients(causal_lm, logps), expected_gradients)
    causal_lm.set_attn_implementation(own_attention)


@given(forests)
def test_rows_are_whole_wherever_their_tokens_are(pairs: list[Example]) -> None:
    batch, plain = pack_unkeyed(pairs), pack_unkeyed(pairs, None)
    rows = [row for pair in pairs for row in input_rows(pair)]
    for row, places in zip(rows, batch.rows, strict=True):
        assert batch.input_ids[places].tolist() == row.tolist()
        assert batch.position_ids[places].tolist() == [*range(len(row))]
    assert batch.repeats.sum() == sum(map(len, rows)) == plain.repeats.sum()
    assert batch.repeats.tolist() == np.bincount(np.concatenate(batch.rows)).tolist()
    ours, theirs = padded_rows(batch, 0), padded_rows(plain, 0)
    assert ours.lengths == theirs.lengths
    for name in ("input_ids", "is_token", "predictors"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()


def test_each_shared_token_is_computed_once() -> None:
    """A tree of four levels: instructions, a question, an answer, a later turn."""
    ((instructions, question, answer, turn),) = [
        pair.responses for pair in random_pairs([(1, 30, 20, 15, 10)])
    ]
    ends = [pair.prompt_ids for pair in random_pairs([(6, 1)] * 5, seed=1)]
    asked = np.concatenate((instructions, question))
    answered = np.concatenate((asked, answer, turn))
    pairs = [
        Example(asked, (np.concatenate((answer, ends[0])), ends[1])),
        Example(answered, (ends[2], ends[3])),
        Example(np.concatenate((instructions, ends[4])), (ends[0], ends[1])),
    ]
    pieces = [30, 20, 15, 5, 5, 10, 5, 5, 6, 5, 5]
    assert len(pack_unkeyed(pairs).input_ids) == sum(pieces)
    again = [*pairs, *pairs, Example(pairs[1].prompt_ids, pairs[1].responses[::-1])]
    assert len(pack_unkeyed(again).input_ids) == sum(pieces)


@given(forests, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.0, 0.1, 100.0]), st.booleans())
def test_no_more_is_computed_than_with_shared_prompts(
    pairs: list[Example], copy: float, key: float, is_masked: bool
) -> None:
    costs = ComputeCosts(key=key, target=0, beyond_prompts=True, copy=copy, is_masked=is_masked)
    plain, tree = pack_unkeyed(pairs, None), pack_unkeyed(pairs, costs)
    assert len(tree.input_ids) <= len(plain.input_ids)
    if len(tree.input_ids) == len(plain.input_ids):
        assert tree.segments == plain.segments
    off = pack_unkeyed(pairs, replace(costs, beyond_prompts=False))
    assert off.segments == plain.segments
    assert len(plain.input_ids) == sum(
        packed_tokens(len(p.prompt_ids), list(map(len, p.responses))) for p in pairs
    )


def test_what_costs_more_than_it_saves_is_not_shared() -> None:
    def shared(prefix: int, own: int, **costs: Any) -> bool:
        same, *others = (pair.prompt_ids for pair in random_pairs([(prefix, 1), (own, 1), (own, 1)]))
        pairs = [Example(np.concatenate((same, other)), (other,)) for other in others]
        batch = pack_unkeyed(pairs, ComputeCosts(**{"key": 0, "target": 0, "beyond_prompts": True} | costs))
        return len(batch.input_ids) < len(pack_unkeyed(pairs, None).input_ids)

    assert [prefix for prefix in (1, 4, 5, 90) if shared(prefix, 9)] == [5, 90]
    assert [copy for copy in (0.5, 0.9, 1.0) if shared(20, 9, copy=copy)] == [0.5]
    # With a mask, all pairs of a query and a key of a segment are computed, else half of them, in blocks.
    assert [own for own in (200, 400) if shared(40, own, key=0.01, is_masked=True)] == [200]
    assert [prefix for prefix in (40, 400) if shared(prefix, 400, key=0.01, is_masked=True)] == [400]
    assert shared(40, 400, key=0.01)


def test_a_prompt_shared_at_a_cost_keeps_no_other_rows_apart() -> None:
    """The long response comes last in the order of ids, so that its row needs the mask; plans do not know."""
    prompt, same, one, other = (pair.prompt_ids for pair in random_pairs([(10, 1), (50, 1), (9, 1), (8, 1)]))
    long, short = np.full(900, 255, dtype=np.int32), np.full(5, 256, dtype=np.int32)
    pairs = [Example(prompt, (long, short))]
    pairs += [Example(np.concatenate((same, end)), (short, long[:5])) for end in (one, other)]
    costs = ComputeCosts(key=0.01, target=0, beyond_prompts=True, is_masked=True)
    assert len(pack_unkeyed(pairs, costs).input_ids) == len(pack_unkeyed(pairs, None).input_ids) - 50


@given(st.integers(1, 3000), st.booleans())
def test_longer_rows_save_no_more(shared: int, is_masked: bool) -> None:
    """A plan knows the longest row only, and must not expect that the others share less."""
    costs = ComputeCosts(key=0.01, target=0, beyond_prompts=True, copy=0.1, is_masked=is_masked)
    saved = costs.saved_by_sharing(np.full(4000, shared), np.arange(4000))
    assert (np.diff(saved) <= 0).all()


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ([4, 5, 6], [4, 5, 7], 2),
        ([4, 5], [4, 5, 7], 2),
        ([4, -1, -2, 6], [4, -1, -2, 7], 3),
        ([4, -1, -2, 6], [4, -1, -3, 7], 1),  # another image whose digest begins alike
        ([4, -1, -2], [4, -1], 1),
        ([-1, -2, 5], [-1, -3, 5], 0),
        ([4], [], 0),
    ],
)
def test_an_image_is_shared_whole(first: list[int], second: list[int], common: int) -> None:
    rows = np.array(first, dtype=np.int32), np.array(second, dtype=np.int32)
    assert common_tokens(*rows) == common_tokens(*rows[::-1]) == common
