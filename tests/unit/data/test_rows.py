"""Rows contain every response behind its own prompt, and predict the same targets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.pack import Sequences, pack, rows_of
from tests.support.packing import pair_shapes, random_pairs

PAD = 1  # no token of `random_pairs`


@given(pair_shapes, st.booleans(), st.randoms(use_true_random=False))
def test_each_row_is_a_prompt_with_one_response_and_padding(shapes, is_masked, random) -> None:  # type: ignore[no-untyped-def]
    pairs = random_pairs(shapes)
    if is_masked:
        pairs = [
            Sequences(
                pair.prompt_ids,
                pair.responses,
                tuple(np.array([random.random() < 0.6 for _ in r]) for r in pair.responses),
            )
            for pair in pairs
        ]
    count = sum(len(pair.responses) for pair in pairs)
    batch = pack(pairs, np.zeros((count, 2), dtype=np.uint64))
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
            places = len(pair.prompt_ids) - 1 + np.flatnonzero(mask)
            predicted_at += (row * longest + places).tolist()
            expected += response[mask].tolist()
            row += 1
    assert longest == max(rows.lengths)
    assert len(rows.input_ids) == row
    assert rows.predictors.tolist() == predicted_at
    assert batch.targets.tolist() == expected
