"""Rankings as training examples: ties, limits, scores and shared ids."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.config.data import DataConfig, DataFormat, Ranked, SourceConfig, Truncation
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.collate import collate
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.data.records import Origin, PreferenceRecord, training_examples
from tests.support import tiny
from tests.support.records import TEXT, jsonl
from tests.support.shared_data import shared_data_dir


def ranking(scores: Sequence[float] | None, count: int = 0) -> PreferenceRecord:
    count = count or len(scores or ())
    return PreferenceRecord(
        "q",
        tuple(f"answer {index}" for index in range(count)),
        Origin("here", 1),
        None if scores is None else tuple(scores),
    )


def encoded(folder: Path, *records: Any, **data: Any) -> PreferenceDataset:
    config = DataConfig(cache=str(folder / "cache"), max_bad_share=1.0, **data)
    sources = [SourceConfig(jsonl(folder, *records))]
    return open_dataset(prepare_dataset(sources, config, tiny.qwen(), "qwen"), config)


def words(dataset: PreferenceDataset, index: int) -> list[str]:
    return [tiny.qwen().decode(ids, skip_special_tokens=True) for ids in dataset.sequences(index).responses]


def scores_of(dataset: PreferenceDataset) -> list[list[float]]:
    return [dataset.scores[list(dataset.response_range(index))].tolist() for index in range(len(dataset))]


def test_ties_are_no_preferences() -> None:
    record = ranking([4, 4, 2, 1, 1, 1])
    assert training_examples(record, Ranked.whole) == ([(0, 2, 3)], 3)
    assert training_examples(record, Ranked.best_worst) == ([(0, 5)], 0)
    pairs, ties = training_examples(record, Ranked.all_pairs)
    assert pairs == [(0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)]
    assert ties == 4


@given(st.lists(st.integers(0, 4), min_size=3, max_size=8).filter(lambda scores: len(set(scores)) > 1))
def test_a_better_response_has_the_higher_score(scores: list[int]) -> None:
    record = ranking(sorted(map(float, scores), reverse=True))
    assert record.scores is not None
    for ranked in Ranked:
        examples, ties = training_examples(record, ranked)
        assert examples
        for example in examples:
            assert len(example) >= 2
            kept = [record.scores[index] for index in example]
            assert all(better > worse for better, worse in pairwise(kept))
        if ranked is Ranked.all_pairs:
            assert len(examples) + ties == len(scores) * (len(scores) - 1) // 2
        if ranked is Ranked.whole:
            assert [len(examples[0]), len(examples[0]) + ties] == [len(set(scores)), len(scores)]


SCORED = {"low": 1, "mid": 4, "tie": 1, "top": 7}
ROWS = [
    {"prompt": "one", "responses": ["best", "middle", "worst"]},
    {"prompt": "two", "responses": [{"text": text, "score": score} for text, score in SCORED.items()]},
    TEXT | {"score_chosen": 2, "score_rejected": 5},
    {"prompt": "three", "completion": "learnt"},
]
NAN = pytest.approx(np.nan, nan_ok=True)


@pytest.mark.parametrize(
    ("ranked", "responses", "scores", "ties"),
    [
        (
            Ranked.whole,
            [["best", "middle", "worst"], ["top", "mid", "low"], ["good", "bad"], ["learnt"]],
            [[NAN] * 3, [7, 4, 1], [2, 5], [NAN]],
            1,
        ),
        (
            Ranked.best_worst,
            [["best", "worst"], ["top", "tie"], ["good", "bad"], ["learnt"]],
            [[NAN] * 2, [7, 1], [2, 5], [NAN]],
            0,
        ),
        (
            Ranked.all_pairs,
            [
                *map(list, combinations(["best", "middle", "worst"], 2)),
                ["top", "mid"],
                ["top", "low"],
                ["top", "tie"],
                ["mid", "low"],
                ["mid", "tie"],
                ["good", "bad"],
                ["learnt"],
            ],
            [*[[NAN] * 2] * 3, [7, 4], [7, 1], [7, 1], [4, 1], [4, 1], [2, 5], [NAN]],
            1,
        ),
    ],
)
def test_scores_match_the_responses_of_each_example(
    tmp_path: Path, ranked: Ranked, responses: Any, scores: Any, ties: int
) -> None:
    data = encoded(tmp_path, *ROWS, ranked=ranked)
    assert [words(data, index) for index in range(len(data))] == responses
    assert scores_of(data) == scores
    assert data.scores.dtype == np.float64
    assert len(data.scores) == len(data.keys)
    assert data.response_counts(np.arange(len(data))).tolist() == [len(texts) for texts in responses]
    counts = [data.counts[name] for name in ("read", "kept", "pairs", "ties_left_out")]
    assert counts == [4, 4, len(responses), ties]


def test_a_micro_batch_has_the_score_gaps_of_its_examples(tmp_path: Path) -> None:
    texts = [{**TEXT, "prompt": f"q{n}", "score_chosen": 9.0, "score_rejected": n} for n in range(4)]
    data = encoded(tmp_path, *texts)
    for indices in ([3, 0, 2], [1], [2, 3]):
        packed = collate(data, indices)
        assert packed.score_gaps is not None
        assert packed.score_gaps.tolist() == [9.0 - index for index in indices]


def test_unused_responses_do_not_count_for_limits(tmp_path: Path) -> None:
    record = {"prompt": "q", "responses": ["short", "long " * 50, "brief"]}
    data = encoded(
        tmp_path, record, TEXT, max_length=30, truncation=Truncation.drop, ranked=Ranked.best_worst
    )
    assert words(data, 0) == ["short", "brief"]
    dropped = encoded(tmp_path, record, TEXT, max_length=30, truncation=Truncation.drop)
    assert dropped.counts["dropped"] == {"too_long": 1}


def test_real_rankings_are_split_into_their_pairs(tmp_path: Path) -> None:
    shared = shared_data_dir()
    if shared is None:
        pytest.skip("needs the slices of real data")
    source = SourceConfig(str(shared / "ranked_oasst_history_zh.json"), DataFormat.ranked)
    datasets = {}
    for ranked in Ranked:
        config = DataConfig(cache=str(tmp_path), max_length=100_000, ranked=ranked)
        datasets[ranked] = open_dataset(prepare_dataset([source], config, tiny.qwen(), "qwen"), config)
    whole = datasets[Ranked.whole]
    counts = whole.response_counts(np.arange(len(whole)))
    pairs = int((counts * (counts - 1) // 2).sum())
    kept = {ranked: (data.counts["kept"], data.counts["pairs"]) for ranked, data in datasets.items()}
    assert kept == {
        Ranked.whole: (244, 244),
        Ranked.best_worst: (244, 244),
        Ranked.all_pairs: (244, pairs),
    }
    assert len(np.unique(datasets[Ranked.all_pairs].keys, axis=0)) == len(np.unique(whole.keys, axis=0))
    assert np.isnan(whole.scores).all()
