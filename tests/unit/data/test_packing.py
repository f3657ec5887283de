"""Packed layout of a micro-batch, and its rows without shared prompts."""

from dataclasses import replace
from random import Random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.pack import Sequences, dummy_batch, pack, rows_of
from tests.support.packing import pack_unkeyed, packed_tokens, pair_shapes, random_pairs


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


@given(pair_shapes)
def test_every_target_is_predicted_by_the_token_before_it(shapes: list[tuple[int, ...]]) -> None:
    pairs = random_pairs(shapes)
    batch = pack_unkeyed(pairs)
    before = [
        (int(token), index)
        for pair in pairs
        for response in pair.responses
        for index, token in enumerate([*pair.prompt_ids, *response][:-1])
        if index >= len(pair.prompt_ids) - 1
    ]
    indices = batch.predictors
    predicting = zip(batch.input_ids[indices].tolist(), batch.position_ids[indices].tolist(), strict=True)
    assert list(predicting) == before
    assert batch.targets.tolist() == [t for p in pairs for r in p.responses for t in r.tolist()]
    assert sum(map(sum, batch.layout)) == len(batch.input_ids) == batch.tokens
    assert batch.tokens == sum(packed_tokens(prompt, responses) for prompt, *responses in shapes)


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
        pairs = [replace(one, masks=own) for one, own in zip(pairs, masks, strict=True)]
    batch = pack_unkeyed(pairs)
    rows = rows_of(batch, PAD)
    longest = rows.input_ids.shape[1]
    expected, predicted_at, row = [], [], 0
    for pair in pairs:
        for which, response in enumerate(pair.responses):
            inputs = np.concatenate((pair.prompt_ids, response[:-1]))
            np.testing.assert_array_equal(rows.input_ids[row, : len(inputs)], inputs)
            assert (rows.input_ids[row, len(inputs) :] == PAD).all()
            assert rows.lengths[row] == len(inputs) == rows.is_token[row].sum()
            assert rows.is_token[row, : len(inputs)].all()
            mask = pair.masks[which] if pair.masks else np.ones(len(response), dtype=bool)
            predicted_at += (row * longest + len(pair.prompt_ids) - 1 + np.flatnonzero(mask)).tolist()
            expected += response[mask].tolist()
            row += 1
    assert (longest, len(rows.input_ids)) == (max(rows.lengths), row)
    assert rows.predictors.tolist() == predicted_at
    assert batch.targets.tolist() == expected
