"""Encoded datasets: examples are read by index as they were encoded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.batching.pack import Ids, packed_tokens
from dpo_dist.config.data import OnBadRecord
from dpo_dist.data import build as build_dataset_module
from dpo_dist.data.collate import collate, shard_batch
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.encode import response_key
from dpo_dist.data.records import Origin, PreferenceRecord
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.cache import encoded_folders, opened
from tests.support.packing import COSTS
from tests.support.pairs import encode
from tests.support.records import jsonl

GOOD = [
    {"prompt": f"question {n}", "chosen": f"right {n}", "rejected": f"wrong {n}" * n} for n in range(1, 8)
]
BAD = {"prompt": "q", "chosen": "same", "rejected": "same"}
# Responses of each record: a record of three responses follows one of one.
RANKED = [2, 1, 3, 2, 3, 1, 1, 2]


def ranked_records() -> list[PreferenceRecord]:
    texts = ["good", "worse than that", "the very worst of all", "none"]
    return [
        PreferenceRecord(
            f"question number {n}", tuple(f"{text} {n}" for text in texts[:k]), Origin("ranked", n)
        )
        for n, k in enumerate(RANKED, start=1)
    ]


@pytest.fixture
def ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreferenceDataset:
    """Return records of one, two and three responses, which no file format mixes yet."""
    monkeypatch.setattr(build_dataset_module, "read_records", lambda _source, _meter: iter(ranked_records()))
    return opened(tmp_path, jsonl(tmp_path, {}))


def same_ids(first: Sequence[Ids], second: Sequence[Ids]) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


def test_examples_are_read_as_they_were_encoded(ranked: PreferenceDataset) -> None:
    assert len(ranked) == len(RANKED)
    for index, record in enumerate(ranked_records()):
        pair = encode(record, tiny.qwen())
        read = ranked.sequences(index)
        assert same_ids((read.prompt_ids, *read.responses), (pair.prompt_ids, *pair.responses))
        assert ranked.lengths(index) == [len(pair.prompt_ids), *map(len, pair.responses)]
        assert ranked.packed_tokens(index) == packed_tokens(
            len(pair.prompt_ids), list(map(len, pair.responses))
        )
        assert ranked.origin(index) == Origin(ranked.source_paths[0], record.origin.line)
        last = [len(pair.responses) - 1]
        assert same_ids(ranked.sequences(index, last).responses, pair.responses[-1:])
        assert ranked.packed_tokens(index, last) == packed_tokens(
            len(pair.prompt_ids), [len(pair.responses[-1])]
        )


def test_response_ranges_match_the_keys(ranked: PreferenceDataset) -> None:
    assert len(ranked.keys) == sum(RANKED)
    for index, count in enumerate(RANKED):
        pair, response_indices = ranked.sequences(index), ranked.response_range(index)
        assert len(response_indices) == count
        for response_index, response in zip(response_indices, pair.responses, strict=True):
            assert ranked.keys[response_index].tobytes() == response_key(pair.prompt_ids, response)
    indices, which_ones = ranked.locate_responses(np.arange(sum(RANKED)))
    assert indices.tolist() == [index for index, count in enumerate(RANKED) for _ in range(count)]
    assert which_ones.tolist() == [which for count in RANKED for which in range(count)]


@pytest.mark.parametrize("indices", [[0], [2, 0, 7], [7, 6, 5, 4, 3, 2, 1, 0], [3, 3], []])
def test_response_indices_of_many_examples_are_those_of_each(
    ranked: PreferenceDataset, indices: list[int]
) -> None:
    expected = [response_index for index in indices for response_index in ranked.response_range(index)]
    assert ranked.response_indices(np.array(indices, dtype=np.int64)).tolist() == expected


def test_sizes_equal_a_count_of_every_token(ranked: PreferenceDataset) -> None:
    indices = np.array([5, 2, 0, 7])
    targets = attended = 0
    for index in indices.tolist():
        prompt, *responses = ranked.lengths(index)
        targets += sum(responses)
        attended += sum(response_index + 1 for response_index in range(prompt))
        attended += sum(
            prompt + response_index + 1 for tokens in responses for response_index in range(tokens - 1)
        )
    plan = shard_batch(ranked, indices, 0, 1, 8192, COSTS)
    assert (plan.targets, plan.attended) == (targets, attended)


def test_a_key_depends_on_the_end_of_the_prompt() -> None:
    one, two, both = (np.array(ids, dtype=np.int32) for ids in ([1], [2], [1, 2]))
    empty = np.array([], dtype=np.int32)
    keys = {
        response_key(one, two),
        response_key(both, empty),
        response_key(empty, both),
        response_key(two, one),
    }
    assert len(keys) == 4
    assert {len(key) for key in keys} == {16}
    assert response_key(one, two) == response_key(one.astype(np.int64), two.astype(np.int64))


def test_counts_include_every_record(tmp_path: Path) -> None:
    path = jsonl(tmp_path, BAD, *GOOD, "no object", {**GOOD[0], "chosen": "right " * 500})
    counts = opened(tmp_path, path, max_bad_share=0.5, max_length=120).counts
    assert counts["read"] == 10
    assert counts["kept"] == 8
    assert counts["dropped"] == {"identical_responses": 1, "unparsable": 1}
    assert counts["response_truncated"] == 1
    assert counts["prompt_truncated"] == 0
    assert counts["examples"] == [f"{path}:1 identical_responses", f"{path}:9 unparsable"]


def test_more_bad_records_than_allowed_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path, BAD, *GOOD)
    assert len(opened(tmp_path, path, max_bad_share=1 / 8)) == 7
    with pytest.raises(DataError, match="1 of 8 records") as raised:
        opened(tmp_path, path, max_bad_share=0.124)
    assert f"{path}:1" in raised.value.where
    assert "identical_responses 1" in raised.value.got


def test_the_first_bad_record_can_be_made_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD[0], BAD)
    with pytest.raises(DataError, match="identical_responses") as raised:
        opened(tmp_path, path, on_bad_record=OnBadRecord.error, max_bad_share=1.0)
    assert raised.value.where == f"{path}:2"
    assert encoded_folders(tmp_path) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_compute_each_example_once_and_agree_on_the_sizes(tmp_path: Path, world_size: int) -> None:
    data = opened(tmp_path, jsonl(tmp_path, *GOOD))
    indices = np.array([5, 1, 3, 6, 0], dtype=np.int64)
    plans = [shard_batch(data, indices, rank, world_size, 60, COSTS) for rank in range(world_size)]
    computed = [index for plan in plans for micro_batch in plan.micro_batches for index in micro_batch]
    assert sorted(computed) == sorted(indices.tolist())
    assert len({len(plan.micro_batches) for plan in plans}) == 1
    assert len({(plan.pairs, plan.tokens, plan.mean_chosen_tokens) for plan in plans}) == 1
    assert plans[0].pairs == len(indices)
    assert plans[0].mean_chosen_tokens == pytest.approx(
        np.mean([data.lengths(index)[1] for index in indices])
    )
    batches = [batch for plan in plans for batch in plan.batches()]
    assert sum(batch.tokens for batch in batches) == plans[0].tokens
    assert sum(float(batch.weights.sum()) for batch in batches) == len(indices)


def test_a_batch_has_the_keys_of_its_responses(ranked: PreferenceDataset) -> None:
    batch = collate(ranked, (4, 1))
    pairs = [ranked.sequences(index) for index in (4, 1)]
    expected = [response_key(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
    assert [key.tobytes() for key in batch.keys] == expected
    assert batch.targets.tolist() == [int(t) for pair in pairs for r in pair.responses for t in r]
    assert collate(ranked, ()).weights.tolist() == [0]
