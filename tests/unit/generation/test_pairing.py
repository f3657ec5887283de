"""Pairs of one prompt's responses by their scores."""

from collections import Counter
from typing import Any

import pytest

from dpo_dist.config.verb_options import PairsConfig, PairSelection
from dpo_dist.generation.pairs.run import select_pairs


def select(
    scores: list[float], key: str = "prompt", seed: int = 0, **rule: Any
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    counts: Counter[str] = Counter()
    return select_pairs(scores, PairsConfig(**rule), seed, key, counts), {
        k: n for k, n in counts.items() if n
    }


def test_the_best_and_the_worst_are_a_pair() -> None:
    assert select([2, 5, 1, 3]) == ([(1, 2)], {})


def test_the_first_of_equally_good_or_bad_responses_counts() -> None:
    assert select([1, 5, 5, 1]) == ([(1, 0)], {"tied_pairs": 2})


@pytest.mark.parametrize("rule", list(PairSelection))
def test_the_scores_of_a_pair_differ_by_more_than_the_margin(rule: PairSelection) -> None:
    assert select([3, 1], select=rule, margin=2) == ([], {"prompts_below_margin": 1})
    assert select([3, 0.9], select=rule, margin=2) == ([(0, 1)], {})


def test_all_pairs_are_those_above_the_margin() -> None:
    pairs, counts = select([1, 4, 2, 4], select=PairSelection.all_pairs, margin=1)
    assert (sorted(pairs), counts) == ([(1, 0), (1, 2), (3, 0), (3, 2)], {"tied_pairs": 1})


def test_a_prompt_without_a_pair_is_counted() -> None:
    assert select([2, 2, 2]) == ([], {"prompts_all_tied": 1, "tied_pairs": 3})
    assert select([2]) == ([], {"prompts_too_few_responses": 1})
    assert select([]) == ([], {"prompts_too_few_responses": 1})


def test_the_random_response_follows_from_seed_and_prompt() -> None:
    scores = [float(number) for number in range(20)]

    def drawn(key: str, seed: int) -> list[tuple[int, int]]:
        return select(scores, key, select=PairSelection.best_random, seed=seed)[0]

    assert drawn("a", 0) == drawn("a", 0)
    assert all(drawn(key, 0)[0][0] == 19 for key in "abc")
    assert len({drawn(key, seed)[0] for key in "abcdef" for seed in (0, 1)}) > 4
    others = {drawn(str(number), 0)[0][1] for number in range(300)}
    assert others == set(range(19))


def test_the_random_response_is_each_other_one_equally_often() -> None:
    pairs = [select([3, 2, 1], str(key), select=PairSelection.best_random)[0][0] for key in range(600)]
    assert 250 < pairs.count((0, 1)) < 350
