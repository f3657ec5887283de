"""Matches are those of brute force; of too many records a sample tells their number within its interval."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.config.schema import DataConfig
from dpo_dist.data.records import Origin
from dpo_dist.tools.doctor.measures.duplicates import Comparison, contradictions, equal_records
from dpo_dist.tools.doctor.measures.observe import RecordFacts
from dpo_dist.tools.doctor.measures.similar import EvaluationPrompts, NearCopyFinder
from dpo_dist.tools.doctor.measures.texts import Signature
from dpo_dist.tools.findings import Finding

Record = tuple[int, Signature]
"""The key of a record, and the signatures of its prompt and its responses."""


@given(st.lists(st.integers(0, 5)))
def test_equal_records_have_the_first_one_as_partner(keys: list[int]) -> None:
    firsts = [-1 if keys.index(key) == at else keys.index(key) for at, key in enumerate(keys)]
    assert equal_records(np.array(keys, dtype=np.uint64)).tolist() == firsts


@given(st.lists(st.sets(st.integers(0, 9), max_size=3)))
def test_records_of_opposite_preferences_are_partners(preferences: list[set[int]]) -> None:
    rows = [[each for each in of_one if each ^ 1 not in of_one] for of_one in preferences]
    found = contradictions(
        np.array([key for row in rows for key in row], dtype=np.uint64),
        np.array([index for index, row in enumerate(rows) for _ in row], dtype=np.int32),
        len(rows),
    )
    for partner, row in zip(found.tolist(), rows, strict=True):
        firsts = [next((at for at, other in enumerate(rows) if key ^ 1 in other), -1) for key in row]
        assert partner in ([first for first in firsts if first >= 0] or [-1])


def records(groups: int, seed: int) -> list[Record]:
    """Return shuffled records: of each group one to five that nearly equal each other, some of them twice.

    Every second group has the prompts of the one before, and responses that resemble its responses by half.
    """
    rng, made = np.random.default_rng(seed), list[Record]()
    base = np.zeros((2, 64), dtype=np.uint32)
    for group in range(groups):
        is_half = group % 2
        changed = base[is_half:, is_half * 32 :]
        changed[:] = rng.integers(1 << 32, size=changed.shape, dtype=np.uint32)
        for _ in range(rng.choice([1, 1, 1, 1, 2, 5])):
            near = base.copy()
            near[rng.integers(2), rng.integers(64, size=3)] += 1
            made += [(int(rng.integers(1 << 64, dtype=np.uint64)), near)] * int(rng.choice([1, 1, 1, 3]))
    random.Random(seed).shuffle(made)
    return made


def near_copies(finder: NearCopyFinder, found: Sequence[Record], chunk: int) -> Any:
    for start in range(0, len(found), chunk):
        keys, signatures = zip(*found[start : start + chunk], strict=True)
        finder.add(keys, np.stack(signatures))
    return finder.result()


@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_up_to_the_limit_each_near_copy_has_the_first_one_as_partner(chunk: int) -> None:
    made, expected, firsts = records(100, 0), dict[int, int](), list[int]()
    for index, (_, sides) in enumerate(made):
        alike = (at for at in firsts if ((made[at][1] == sides).mean(axis=1) >= 0.7).all())
        if (first := next(alike, None)) is None:
            firsts.append(index)
        else:
            expected[index] = first
    found = near_copies(NearCopyFinder(len(made), 1), made, chunk)
    assert (found.partners, found.sampled, len(firsts)) == (expected, None, 100)


def test_a_sample_does_not_depend_on_chunks_and_names_near_copies() -> None:
    made = records(300, 1)
    first, *others = (near_copies(NearCopyFinder(50, 120), made, chunk) for chunk in (1, 64, 333))
    assert all(other == first for other in others)
    keys = [key for key, _ in made]
    smallest = sorted(set(keys))[: len(first.sampled)]
    assert 60 <= len(first.sampled) <= 120
    assert first.sampled == sorted(map(keys.index, smallest))
    for index in first.sampled:
        last = len(keys) - 1 - keys[::-1].index(keys[index])
        later = [at for at in range(last + 1, len(made)) if (made[at][1] == made[index][1]).mean() > 0.8]
        assert first.partners.get(index) == min(later, default=None)


def compared(made: Sequence[Record], is_eval: Sequence[bool], limit: int, sampled: int) -> Any:
    """Return the counts and the findings about records; prompts are equal if the keys are."""
    prompts = EvaluationPrompts(limit)
    prompts.add((key, sides[0]) for (key, sides), each in zip(made, is_eval, strict=True) if each)
    comparison = Comparison(DataConfig(), prompts, NearCopyFinder(limit, sampled))
    for line, ((key, sides), each) in enumerate(zip(made, is_eval, strict=True), 1):
        if line in (1, 700):
            comparison.add_source(f"source {line}", is_eval=False)
        facts = RecordFacts(Origin("a", line), is_readable=True, is_held_out=each, signatures=sides)
        facts.record = facts.prompt = facts.hash = key
        comparison.add([facts])
    return comparison.result()


@pytest.mark.parametrize("seed", range(4))
def test_the_number_of_near_copies_is_estimated_within_its_interval(seed: int) -> None:
    made = records(900, seed)
    none = [False] * len(made)
    (exact, of_all), (across, of_sample) = (
        compared(made, none, *limits) for limits in ((len(made), 1), (200, 600))
    )
    [truth], [finding] = (
        [one for one in found if one.rule == "near_duplicates"] for found in (of_all, of_sample)
    )
    assert {**across, "near_duplicates": 0} == {**exact, "near_duplicates": 0}
    low, high = interval(finding, len(made))
    assert low <= truth.count <= high
    assert low <= finding.count <= high < 1.7 * low
    assert across["near_duplicates"] == finding.count + across["duplicates"]
    assert finding.text.startswith(f"about {finding.count} of {len(made)} records")
    assert 300 <= int(finding.text.split("estimated from ")[1].split(" sampled records")[0]) <= 600
    assert " in source 1, " in finding.text


@pytest.mark.parametrize("seed", range(4))
def test_the_number_of_leaked_prompts_is_estimated_within_its_interval(seed: int) -> None:
    made = records(700, seed)
    is_eval = [key % 3 == 0 for key, _ in made]
    [truth], [finding] = (
        [one for one in compared(made, is_eval, limit, 300)[1] if one.rule == "near_train_eval_leak"]
        for limit in (len(made), 150)
    )
    low, high = interval(finding, sum(is_eval))
    assert low <= truth.count <= high < 2 * low
    assert low <= finding.count <= high


def interval(finding: Finding, total: int) -> tuple[float, float]:
    """Return the ends of the interval in the text, in records; they are rounded to a per cent."""
    words = finding.text.split("sampled records, ")[1].split(" ")
    return (float(words[0]) - 0.5) * total / 100, (float(words[3]) + 0.5) * total / 100
