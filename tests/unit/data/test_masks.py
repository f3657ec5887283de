"""Masks of the tokens that the loss counts: from encoded examples to the targets of a micro-batch."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from dpo_dist.batching.pack import Sequences, pack
from dpo_dist.batching.plan import ComputeCosts
from dpo_dist.config.data import Ranked, SourceConfig
from dpo_dist.data import build as build_dataset_module
from dpo_dist.data.collate import collate, shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from tests.support.cache import opened
from tests.support.masks import add_masks, masked, random_mask
from tests.support.packing import dataset_of, pack_unkeyed, pair_shapes, random_pairs
from tests.support.records import jsonl

ONE_PER_TARGET = ComputeCosts(key=0, target=1)


def ranking(number: int) -> dict[str, Any]:
    return {
        "prompt": f"question {number}",
        "responses": [f"answer {n} " * (n + number) for n in range(1, 3 + number % 3)],
    }


def masks_of(dataset: PreferenceDataset, index: int) -> list[list[bool]]:
    """Return the masks of all responses of an example, of those without one too."""
    pair = dataset.sequences(index, masked=True)
    return [mask.tolist() for mask in pair.masks or [np.ones(len(r), bool) for r in pair.responses]]


def expected_masks(dataset: PreferenceDataset, index: int, seed: int = 0) -> list[list[bool]]:
    return [random_mask(response, seed).tolist() for response in dataset.sequences(index).responses]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    parts = [list(map(ranking, range(start, start + 5))) for start in (0, 5, 10)]
    for number in range(len(parts)):
        (tmp_path / str(number)).mkdir()
    return [jsonl(tmp_path / str(number), *rows) for number, rows in enumerate(parts)]


@pytest.mark.parametrize("ranked", Ranked)
def test_masks_of_several_sources_are_read_as_they_were_encoded(
    ranked: Ranked, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of sources before and after one without masks, of several chunks, and of a part of a source."""
    monkeypatch.setattr(build_dataset_module, "CHUNK_RECORDS", 2)
    plain = opened(tmp_path, sources[1], ranked=ranked)
    add_masks(monkeypatch)
    data = opened(tmp_path, sources[0], sources[1], SourceConfig(sources[2], limit=4), ranked=ranked)
    first, second, _ = data.source_pairs
    middle = range(first, first + second)
    for index in range(len(data)):
        expected = expected_masks(data, index)
        if index in middle:
            expected = [[True] * len(mask) for mask in expected]
            assert data.masks(index) == ()
        assert masks_of(data, index) == expected
        last = data.sequences(index, [len(expected) - 1], masked=True)
        assert [mask.tolist() for mask in last.masks] == (expected[-1:] if last.masks else [])
    assert len(plain) == second
    assert not np.asarray(data.trained[:]).all()


def test_counted_tokens_are_targets_and_the_whole_response_is_computed(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_masks(monkeypatch)
    data = opened(tmp_path, *sources)
    every = np.arange(len(data))
    responses, counts = data.response_indices(every), data.response_counts(every)
    sizes = data.sizes(every, responses, counts, ONE_PER_TARGET, masked=True)
    whole = data.sizes(every, responses, counts, ONE_PER_TARGET)
    trained = [sum(itertools.chain(*masks_of(data, index))) for index in every]
    assert sizes.targets.tolist() == trained
    assert whole.targets.tolist() == [sum(data.lengths(index)[1:]) for index in every]
    assert (sizes.tokens == whole.tokens).all()
    assert (sizes.attended == whole.attended).all()
    assert (sizes.costs - whole.costs).tolist() == (sizes.targets - whole.targets).tolist()
    chosen = [sum(masks_of(data, index)[0]) for index in every]
    assert data.mean_chosen_tokens(every) == pytest.approx(np.mean(chosen))
    plan = shard_batch(data, every, 0, 1, 64, ONE_PER_TARGET)
    batches = list(plan.batches())
    assert plan.targets == sum(trained) == sum(len(batch.targets) for batch in batches)
    assert plan.tokens == sum(batch.tokens for batch in batches)
    only_chosen = collate(data, every.tolist(), only_chosen=True)
    assert only_chosen.response_tokens.tolist() == chosen


def test_masked_targets_by_hand() -> None:
    def ids(*numbers: int) -> Any:
        return np.array(numbers, dtype=np.int32)

    pairs = [
        Sequences(ids(1, 2), (ids(4, 5, 6), ids(7, 8)), (np.array([0, 1, 1], bool), np.array([1, 0], bool))),
        Sequences(ids(9), (ids(10), ids(11, 12))),
    ]
    batch = pack(pairs, np.zeros((4, 2), dtype=np.uint64))
    assert batch.input_ids.tolist() == [1, 2, 4, 5, 7, 9, 11]
    assert batch.layout == ((2, 2, 1), (1, 0, 1))
    assert batch.targets.tolist() == [5, 6, 7, 10, 11, 12]
    assert batch.predictors.tolist() == [2, 3, 1, 5, 5, 6]
    assert batch.response_tokens.tolist() == [2, 1, 1, 2]
    assert batch.pair_tokens == [(2, 1), (1, 2)]
    assert batch.mask is not None
    assert batch.mask.tolist() == [False, True, True, True, False, True, True, True]


@given(pair_shapes)
def test_a_mask_selects_targets_and_their_predictors(shapes: list[tuple[int, ...]]) -> None:
    pairs = list(map(masked, random_pairs(shapes)))
    whole = pack_unkeyed([replace(pair, masks=()) for pair in pairs])
    batch = pack_unkeyed(pairs)
    mask = np.concatenate([mask for pair in pairs for mask in pair.masks])
    assert batch.targets.tolist() == whole.targets[mask].tolist()
    assert batch.predictors.tolist() == whole.predictors[mask].tolist()
    assert batch.input_ids.tolist() == whole.input_ids.tolist()
    assert batch.layout == whole.layout
    assert batch.pair_tokens == [tuple(int(mask.sum()) for mask in pair.masks) for pair in pairs]
    assert [masks_of(dataset_of(pairs), index) for index in range(len(pairs))] == [
        [mask.tolist() for mask in pair.masks] for pair in pairs
    ]
