"""Encoded datasets: examples, rankings, scores and masks by index; what a loss can use; counts."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.batching.content_keys import response_key
from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.sampler import (
    BatchSampler,
    SourceSpan,
    batch_note,
    check_batch,
    make_sampler,
    short_run_warnings,
)
from dpo_dist.batching.step_batch import collate, shard_batch
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import TrainerConfig
from dpo_dist.data.config import Ranked, SourceConfig
from dpo_dist.data.counts import describe_counts
from dpo_dist.data.example import TokenIds
from dpo_dist.data.records import Origin, PreferenceRecord
from dpo_dist.encoded import build as build_dataset_module
from dpo_dist.encoded.dataset import (
    PreferenceDataset,
    check_fits_loss,
    check_ids_in_vocabulary,
    count_shared,
)
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support import tiny
from tests.support.cache import opened
from tests.support.masks import add_masks, random_mask
from tests.support.packing import dataset_of, random_pairs
from tests.support.pairs import encode
from tests.support.records import BAD, GOOD, TEXT, jsonl

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
def ranked(tmp_path: Path) -> PreferenceDataset:
    rows: list[dict[str, Any]] = [
        {"prompt": record.prompt, "completion": record.responses[0]}
        if len(record.responses) == 1
        else {
            "prompt": record.prompt,
            "responses": record.responses,
            "scores": [*range(len(record.responses), 0, -1)],
        }
        for record in ranked_records()
    ]
    return opened(tmp_path, *(file_of(tmp_path, str(number), row) for number, row in enumerate(rows)))


def same_ids(first: Sequence[TokenIds], second: Sequence[TokenIds]) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


def test_examples_are_read_as_they_were_encoded(ranked: PreferenceDataset) -> None:
    assert len(ranked) == len(RANKED)
    for index, record in enumerate(ranked_records()):
        found, read = encode(record, tiny.qwen()), ranked.example(index)
        lengths = list(map(len, found.responses))
        assert same_ids((read.prompt_ids, *read.responses), (found.prompt_ids, *found.responses))
        assert ranked.lengths(index) == [len(found.prompt_ids), *lengths]
        assert ranked.origin(index) == Origin(ranked.source_paths[index], 1)
        last = [len(lengths) - 1]
        assert same_ids(ranked.example(index, last).responses, found.responses[-1:])


def test_response_ranges_match_the_keys(ranked: PreferenceDataset) -> None:
    assert len(ranked.keys) == sum(RANKED)
    for index, count in enumerate(RANKED):
        pair, response_indices = ranked.example(index), ranked.response_range(index)
        assert len(response_indices) == count
        for response_index, response in zip(response_indices, pair.responses, strict=True):
            assert ranked.keys[response_index].tobytes() == response_key(pair.prompt_ids, response)
    indices, which_ones = ranked.locate_responses(np.arange(sum(RANKED)))
    assert indices.tolist() == [index for index, count in enumerate(RANKED) for _ in range(count)]
    assert which_ones.tolist() == [which for count in RANKED for which in range(count)]
    for some in ([0], [2, 0, 7], [7, 6, 5, 4, 3, 2, 1, 0], [3, 3], []):
        expected = [response_index for index in some for response_index in ranked.response_range(index)]
        assert ranked.response_indices(np.array(some, dtype=np.int64)).tolist() == expected


def test_more_bad_records_than_allowed_are_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path, BAD, *GOOD)
    assert len(opened(tmp_path, path, max_bad_share=1 / 8)) == 7
    for share in (0.124, 0.0):
        with pytest.raises(DataError, match="1 of 8 records") as raised:
            opened(tmp_path, path, max_bad_share=share)
        assert f"{path}:1" in raised.value.where
        assert "identical_responses 1" in raised.value.got


def test_ids_that_decay_on_disk_are_not_trained_on(tmp_path: Path) -> None:
    data = opened(tmp_path, jsonl(tmp_path, *GOOD))
    ids = np.asarray(data.ids).copy()
    ids[data.piece_starts[1]] ^= 1
    with pytest.raises(DataError, match="do not match their content key") as raised:
        collate(replace(data, ids=ids), [0, 1])
    assert str(data.origin(0)) in raised.value.where


def test_a_token_without_an_embedding_is_named_before_training(tmp_path: Path) -> None:
    """The largest id is counted when the data are encoded: ids are not read at each start."""
    data = opened(tmp_path, jsonl(tmp_path, *GOOD))
    largest = int(np.asarray(data.ids).max())
    data = replace(data, ids=np.empty(0, dtype=np.int32))
    check_ids_in_vocabulary(data, tiny.qwen(), largest + 1)
    with pytest.raises(ConfigError, match="without an embedding") as raised:
        check_ids_in_vocabulary(data, tiny.qwen(), largest)
    assert repr(tiny.qwen().convert_ids_to_tokens(largest)) in raised.value.got


def test_examples_of_no_use_to_the_loss_are_listed() -> None:
    data = dataset_of(random_pairs([(1, 1, 1)] * 3))
    scores = np.array([1, 0, np.nan, np.nan, 3, 2])
    data = replace(data, origins=np.array([[0, 1], [0, 2], [0, 3]]), scores=scores)
    check_fits_loss(data, LossConfig(LossKind.sigmoid))
    with pytest.raises(DataError, match="odpo cannot use 1 of 3 examples") as raised:
        check_fits_loss(data, LossConfig(LossKind.odpo))
    assert raised.value.where == ":2"
    assert raised.value.got.startswith("no scores")


def test_rankings_of_scores_take_no_label_smoothing(tmp_path: Path) -> None:
    ranking = {"prompt": "three", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}
    pairs = file_of(tmp_path, "pairs", TEXT | {"margin": 1.0})
    data = opened(tmp_path, pairs, file_of(tmp_path, "rankings", ranking))
    check_fits_loss(data, LossConfig(LossKind.reward))
    with pytest.raises(DataError, match="cannot use 1 of 2") as raised:
        check_fits_loss(data, LossConfig(LossKind.reward, label_smoothing=0.1))
    assert raised.value.got.startswith("a ranking beside loss.label_smoothing")


SCORED = {"low": 1, "mid": 4, "tie": 1, "top": 7}
ROWS = [
    {"prompt": "one", "responses": ["best", "middle", "worst"], "scores": [3, 2, 1]},
    {"prompt": "two", "responses": [{"content": text, "score": score} for text, score in SCORED.items()]},
    TEXT | {"score_chosen": 2, "score_rejected": 5},
    {"prompt": "three", "completion": "learnt"},
]
GIVEN: dict[str, float] = SCORED | {"best": 3, "middle": 2, "worst": 1, "good": 2, "bad": 5}


@pytest.mark.parametrize(
    ("how", "responses", "ties"),
    [
        (Ranked.whole, "best middle worst, top mid low, good bad, learnt", 1),
        (Ranked.best_worst, "best worst, top tie, good bad, learnt", 0),
        (
            Ranked.all_pairs,
            "best middle, best worst, middle worst, top mid, top low, top tie, mid low, mid tie, good bad, "
            "learnt",
            1,
        ),
    ],
)
def test_scores_match_their_responses(tmp_path: Path, how: Ranked, responses: str, ties: int) -> None:
    files = (file_of(tmp_path, str(number), row) for number, row in enumerate(ROWS))
    data = opened(tmp_path, *files, ranked=how)
    examples = [words.split() for words in responses.split(", ")]
    for index, words in enumerate(examples):
        ids = data.example(index).responses
        assert [tiny.qwen().decode(one, skip_special_tokens=True) for one in ids] == words
        scores = [float(GIVEN.get(word, np.nan)) for word in words]
        np.testing.assert_array_equal(data.scores[list(data.response_range(index))], scores)
        gap = collate(data, [index]).score_gaps
        assert gap is not None
        np.testing.assert_array_equal(gap, [scores[0] - scores[-1]])
    assert len(data.scores) == len(data.keys)
    assert [data.counts[name] for name in ("kept", "pairs", "ties_left_out")] == [4, len(examples), ties]


def file_of(folder: Path, name: str, *rows: object) -> str:
    (folder / name).mkdir()
    return jsonl(folder / name, *rows)


def masks_of(dataset: PreferenceDataset, index: int) -> list[list[bool]]:
    pair = dataset.example(index, masked=True)
    return [mask.tolist() for mask in pair.masks]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    def row(number: int) -> dict[str, Any]:
        responses = [f"answer {n} " * (n + number) for n in range(1, 3 + number % 3)]
        scores = [*range(len(responses), 0, -1)]
        return {"prompt": f"question {number}", "responses": responses, "scores": scores}

    return [file_of(tmp_path, str(start), *map(row, range(start, start + 5))) for start in (0, 5, 10)]


@pytest.mark.parametrize("how", Ranked)
def test_masks_of_several_sources_are_read_as_they_were_encoded(
    how: Ranked, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_dataset_module, "CHUNK_RECORDS", 2)
    plain = opened(tmp_path, sources[1], ranked=how)
    add_masks(monkeypatch)
    data = opened(tmp_path, sources[0], sources[1], SourceConfig(sources[2], limit=4), ranked=how)
    first, second, _ = data.source_pairs
    assert len(plain) == second
    for index in range(len(data)):
        expected = [random_mask(response).tolist() for response in data.example(index).responses]
        if first <= index < first + second:
            expected = [[True] * len(mask) for mask in expected]
            assert data.masks(index) == ()
        assert masks_of(data, index) == expected
        last = data.example(index, [len(expected) - 1], masked=True)
        assert [mask.tolist() for mask in last.trained] == (expected[-1:] if last.trained else [])


def test_counted_tokens_are_targets_and_the_whole_response_is_computed(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_masks(monkeypatch)
    data, costs = opened(tmp_path, *sources), ComputeCosts(key=0, target=1)
    every = np.arange(len(data))
    responses, counts = data.response_indices(every), data.response_counts(every)
    sizes = data.sizes(every, responses, counts, costs, masked=True)
    whole = data.sizes(every, responses, counts, costs)
    trained = [sum(itertools.chain(*masks_of(data, index))) for index in every]
    assert sizes.targets.tolist() == trained
    assert whole.targets.tolist() == [sum(data.lengths(index)[1:]) for index in every]
    assert [sizes.tokens.tolist(), sizes.attended.tolist()] == [
        whole.tokens.tolist(),
        whole.attended.tolist(),
    ]
    assert (sizes.costs - whole.costs).tolist() == (sizes.targets - whole.targets).tolist()
    chosen = [sum(masks_of(data, index)[0]) for index in every]
    plan = shard_batch(data, every, 0, 1, 64, costs)
    assert plan.mean_chosen_tokens == pytest.approx(np.mean(chosen))
    batches = list(plan.batches())
    assert plan.targets == sum(trained) == sum(len(batch.targets) for batch in batches)
    assert plan.computed_tokens == sum(batch.tokens for batch in batches)
    assert collate(data, every.tolist(), 0).response_tokens.tolist() == chosen


def test_a_key_depends_on_the_end_of_the_prompt() -> None:
    one, two, both, empty = (np.array(ids, dtype=np.int32) for ids in ([1], [2], [1, 2], []))
    keys = {response_key(*ids) for ids in ((one, two), (both, empty), (empty, both), (two, one))}
    assert sorted(map(len, keys)) == [16] * 4
    assert response_key(one, two) == response_key(one.astype(np.int64), two.astype(np.int64))
    # Other bytes would find nothing in the stores that people have.
    assert response_key(both, np.array([3])).hex() == "b7abc0cbb050379e92e572433910e0a9"


# Counts of records by source and by field, errors with their remedies, duplicates.
def test_every_source_has_its_counts(tmp_path: Path) -> None:
    bad = TEXT | {"chosen": None}
    first, second = file_of(tmp_path, "one", *GOOD), file_of(tmp_path, "two", *GOOD[:3], bad)
    counts = opened(tmp_path, first, second, max_bad_share=0.5).counts
    found = [[source[name] for name in ("path", "read", "kept", "dropped")] for source in counts["sources"]]
    assert found == [[first, 7, 7, {}], [second, 4, 3, {"missing_field": 1}]]
    lines = describe_counts("train", counts)
    assert "10 of 11 records kept" in lines[0]
    assert lines[1] == "  1 dropped (missing_field): a prompt or response is missing"
    assert f"source records-2 ({second}): 3 of 4 records kept: text" in "\n".join(lines)


def test_duplicates_are_counted(tmp_path: Path) -> None:
    swapped = GOOD[0] | {"chosen": GOOD[0]["rejected"], "rejected": GOOD[0]["chosen"]}
    ranking = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}
    other_order = ranking | {"responses": ["a", "c", "b"]}
    rankings = file_of(tmp_path, "rankings", ranking, other_order)
    once = opened(tmp_path, file_of(tmp_path, "once", *GOOD, swapped), rankings)
    assert once.counts["duplicates"] == 0
    twice = opened(
        tmp_path,
        file_of(tmp_path, "a", *GOOD, GOOD[3]),
        file_of(tmp_path, "ranked", ranking, ranking),
        file_of(tmp_path, "b", *GOOD[:5]),
    )
    assert twice.counts["duplicates"] == 7
    held_out = opened(
        tmp_path,
        file_of(tmp_path, "c", GOOD[0], GOOD[0], TEXT, swapped),
        file_of(tmp_path, "other", other_order),
    )
    assert (count_shared(held_out, once), count_shared(held_out, twice)) == (4, 2)


@pytest.mark.parametrize(
    ("pairs", "batch"),
    [(1, 1), (3, 2), (8, 2), (24, 2), (32, 4), (40, 4), (63, 4), (64, 64), (100, 64), (1000, 64)],
)
def test_the_default_batch_fits_the_data(pairs: int, batch: int) -> None:
    trainer = TrainerConfig(max_steps=5)
    sampler = make_sampler([SourceSpan(0, pairs // 2, 1.0), SourceSpan(pairs // 2, pairs, 1.0)], trainer)
    check_batch(sampler)
    assert (sampler.global_batch_pairs, sampler.steps, sampler.total_pairs) == (batch, 5, 5 * batch)
    note = batch_note(sampler, trainer)
    assert bool(note) == (batch != 64)
    assert not note or f"steps of {batch} pair" in note


@pytest.mark.parametrize(
    ("weight", "batch", "remedy"),
    [(1, 161, 16), (1, 1000, 16), (0.1, 17, 2), (2, 321, 32), (1, 160, None), (2, 320, None)],
)
def test_a_step_of_more_pairs_than_the_data_is_refused(weight: float, batch: int, remedy: int | None) -> None:
    def sampler(batch: int) -> BatchSampler:
        return make_sampler(
            [SourceSpan(0, 160, weight)], TrainerConfig(global_batch_pairs=batch, max_steps=9)
        )

    if remedy is None:
        check_batch(sampler(batch))
        return
    with pytest.raises(ConfigError, match="a step has more pairs than the training data") as caught:
        check_batch(sampler(batch))
    assert caught.value.remedy == f"set trainer.global_batch_pairs={remedy}"
    check_batch(sampler(remedy))


@pytest.mark.parametrize(
    ("pairs", "trainer", "expected"),
    [
        (100, {"global_batch_pairs": 64, "max_steps": 1}, "the whole run is 1 step: 64 pairs"),
        (12, {"global_batch_pairs": 10, "epochs": 2.0}, None),
    ],
)
def test_a_very_short_run_is_announced(pairs: int, trainer: dict[str, Any], expected: str | None) -> None:
    lines = short_run_warnings(make_sampler([SourceSpan(0, pairs, 1.0)], TrainerConfig(**trainer)))
    assert len(lines) == (expected is not None)
    assert expected is None or expected in lines[0]
