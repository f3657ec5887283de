"""A regrouped batch predicts the same targets, from prompts that only responses of one group share."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.pack import Regrouped, Sequences, dummy_batch, regroup
from tests.support.packing import pack_unkeyed, pair_shapes, random_pairs


def contexts(
    ids: torch.Tensor, layout: tuple[tuple[int, ...], ...], predictors: torch.Tensor
) -> list[list[int]]:
    """Return the tokens of prompt and response from which each target is predicted."""
    before: list[list[int]] = []
    for prompt, *responses in layout:
        start = len(before)
        prompt_ids = ids[start : start + prompt].tolist()
        before += [prompt_ids[: place + 1] for place in range(prompt)]
        for tokens in responses:
            own = ids[len(before) : len(before) + tokens].tolist()
            before += [prompt_ids + own[: place + 1] for place in range(tokens)]
    return [before[index] for index in predictors.tolist()]


def check_same_predictions(batch_pairs: list[Sequences], groups: list[int]) -> Regrouped:
    batch = pack_unkeyed(batch_pairs)
    regrouped = regroup(batch, groups)
    ids, positions = batch.input_ids[regrouped.tokens], batch.position_ids[regrouped.tokens]
    assert contexts(ids, regrouped.layout, regrouped.predictors) == contexts(
        batch.input_ids, batch.layout, batch.predictors
    )
    assert positions.tolist() == [
        place
        for prompt, *responses in regrouped.layout
        for place in (*range(prompt), *(prompt + own for tokens in responses for own in range(tokens)))
    ]
    return regrouped


def test_regrouped_by_hand() -> None:
    pairs = random_pairs([(3, 2, 4, 1), (2, 3)])
    regrouped = check_same_predictions(pairs, [1, 0, 1, 0])
    assert regrouped.layout == ((3, 3), (2, 2), (3, 1, 0))
    assert regrouped.groups == (0, 0, 1)
    # The batch is [3 prompt, 1, 3, 0 | 2 prompt, 2].
    assert regrouped.tokens.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3]
    assert regrouped.predictors.tolist() == [12, 13, 2, 3, 4, 5, 12, 7, 8, 9]


@given(pair_shapes, st.data())
def test_every_target_keeps_its_context(shapes: list[tuple[int, ...]], data: st.DataObject) -> None:
    responses = sum(len(shape) - 1 for shape in shapes)
    groups = data.draw(st.lists(st.integers(0, 2), min_size=responses, max_size=responses))
    regrouped = check_same_predictions(random_pairs(shapes), groups)
    assert list(regrouped.groups) == sorted(regrouped.groups)
    of_examples = [group for shape in shapes for group in [len(shape) - 1]]
    ends = np.cumsum(of_examples)
    divided = [set(groups[end - count : end]) for end, count in zip(ends, of_examples, strict=True)]
    assert len(regrouped.layout) == sum(map(len, divided))


@given(pair_shapes)
def test_one_group_leaves_a_batch_as_it_is(shapes: list[tuple[int, ...]]) -> None:
    batch = pack_unkeyed(random_pairs(shapes))
    regrouped = regroup(batch, [0] * len(batch.response_tokens))
    assert regrouped.layout == batch.layout
    assert regrouped.tokens.tolist() == list(range(len(batch.input_ids)))
    assert regrouped.predictors.tolist() == batch.predictors.tolist()


@given(pair_shapes)
def test_groups_of_single_responses_are_rows(shapes: list[tuple[int, ...]]) -> None:
    pairs = random_pairs(shapes)
    rows = [np.concatenate((pair.prompt_ids, r[:-1])) for pair in pairs for r in pair.responses]
    regrouped = check_same_predictions(pairs, list(range(len(rows))))
    assert [sum(entry) for entry in regrouped.layout] == list(map(len, rows))
    assert torch.equal(
        pack_unkeyed(pairs).input_ids[regrouped.tokens], torch.from_numpy(np.concatenate(rows))
    )


def test_tokens_that_are_no_targets_have_no_predictor() -> None:
    (pair,) = random_pairs([(3, 4, 3)])
    masks = (np.array([True, False, False, True]), np.array([False, True, True]))
    check_same_predictions([replace(pair, masks=masks)], [0, 1])


def test_a_dummy_is_regrouped() -> None:
    regrouped = regroup(dummy_batch(), [0, 1])
    assert regrouped.layout == ((2, 0), (2, 0))
    assert regrouped.tokens.tolist() == [0, 1, 0, 1]
    assert regrouped.predictors.tolist() == [1, 3]
